"""A metric for `bagel-ds evaluate --metric`: how often the answer of a BlockMoving puzzle is exactly right.

Write your own like it: a function of what the network made of a row's question (`prediction.text` and
`prediction.images`) and of the row itself, as a dictionary of its columns. It returns a number; the table shows the
mean over all rows.
"""


def exact_answer(prediction, row):
    """1 where the text ends with "The answer is: ..." and that is the row's answer, else 0."""
    found = (prediction.text or "").lower().rpartition("answer is")[2]
    return float(words(found) == words(row["answer"]))


def words(text):
    """Without case, spacing, and punctuation around the text."""
    return text.lower().strip(" .:!*\n").split()
