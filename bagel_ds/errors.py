"""The one exception a person can cause.

Guarantees: a `UserError` reaches the terminal as its message alone, without a traceback, and ends the process with exit
code 2. Everything else is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input. The message names the file or argument, what was found, what was expected and what to do."""


def all_faults(faults: list[str], heading: str) -> None:
    """Raise one `UserError` that lists every fault, or return when there is none."""
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(heading + "\n" + "\n".join(f"  - {fault}" for fault in faults))
