"""`bagel-ds web`: a page that draws, edits, answers and reasons with a model folder, for a browser on this machine.

Promises: a picture is the one that `bagel-ds generate` draws with the same seed and settings; the page works offline,
as it consists of the files beside this one and needs nothing but Python's own HTTP server; uploaded pictures go through
the same checks as `generate`'s. Begin reading in `work.py`: requests wait in a line, one thread does them.
`models.py` holds the weights, `server.py` speaks HTTP, `page/` is what the browser gets.
"""
