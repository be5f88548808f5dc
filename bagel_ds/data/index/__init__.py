"""The index: what each row costs (token lengths, picture sizes), known before training reads the row.

Promises: a bad row is a reason, never an exception; an index is used only for the file, tokenizer and format version
that it was made for; pictures that are added or replaced are noticed; the arrays are mapped from the cache, so that
ranks share them. It imports `formats`, `samples` and `files`, and knows nothing of plans or batches. Begin with
`index.py`, `DataIndex`; `records.py` says what is remembered, `cache.py` where.
"""
