"""`bagel-ds convert`: what people have (pictures with captions, edited pairs, conversations) -> the training formats.

Promises: a row that can't be used is named with its place and reason, and the others go on. Pictures keep their bytes,
except those that EXIF turns, because training ignores EXIF. An interrupted conversion continues after its last complete
shard and ends with the same files; changed input or options are refused. May import data and what lies below it. Begin
with conversion.py: tables.py reads rows, captions.py, edit.py and chat.py convert one row, outputs.py writes files,
config.py writes the dataset YAML.
"""
