"""The options of a training run, from the command line or a YAML file to one frozen `RunConfig`.

The way from argv: `parse_arguments` (`run_config.py`) calls `read_words` and `read_option_file` (`parse.py`), which
turn words into values by the types in `options.py`; `make_config` checks the values together and adds the notes for the
log. All faults are raised as one `UserError`. Only `config_files`, `machine` and the names of attention backends are
imported, so that reading a command line needs no torch. Begin with `options.py` to add an option, and with `_faults`
and `_notes` in `run_config.py` to refuse or explain a value.
"""
