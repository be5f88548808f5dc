"""The memory planner: what a run will need on each GPU, host and NVMe, and which settings fit if it does not.

Promises: arithmetic on shapes and settings only, so an answer takes milliseconds and needs no GPU and no weights; every
number is an item with a name; on CPU the sums are within 10 % of measured runs. May import `arguments`, `zero.config`,
`model/shape`, `errors` and `units`. Begin with planner.py (`plan_memory`): states.py counts what stays from step to
step, phases.py what comes and goes within one (gathering.py replays ZeRO-3's fetches for it), traffic.py what is moved.
report.py prints a plan, suggestions.py looks for settings that fit, table.py makes the table of docs/low_memory.md.
"""
