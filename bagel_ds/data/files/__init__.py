"""Bytes of data files: where they lie, which may be opened, the rows in them.

Promises: only regular files are opened, whatever their names; what a header claims is checked against the file's size;
pictures stay encoded; a failure is an exception with a reason in words that costs one file, row group or row. The
package knows nothing of data formats and imports none of `data`. Begin with `rows.py`.
"""
