"""The command line: `bagel-ds` and its commands.

The way from argv: `main.py` parses a command's own options and hands every other word to the command as
`options.training`; a command for a training run passes these to `parse_arguments` (`arguments/run_config.py`), opens
what they name (`inputs/`) and prints its result. `launch_line.py` takes a pasted launcher line apart first. A mistake
of the user is one message and exit code 2. Each command imports what it needs when it runs, so that `--help` needs no
torch. May import every other room. Begin with `make_parser` in `main.py`.
"""
