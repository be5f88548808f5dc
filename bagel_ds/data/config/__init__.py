"""From a dataset YAML and a dataset_info file to a `DatasetConfig`: which files, how often, through which transform.

Whatever the files hold, they are used or refused with one `UserError` that gives every fault its line. Only names of
files are looked at here, and every file of the result exists. May import `data.formats`, `data.samples` and
`data.files`. Begin with `load_dataset_config` in `dataset_config.py`; paths are found in `dataset_entry.py`,
dataset_info is read in `dataset_info.py`.
"""
