"""The public names of a run's metrics: changing one breaks users' dashboards."""

METRIC_NAMES = (
    "loss/mse",
    "loss/ce",
    "loss/total",
    "optim/lr",
    "optim/grad_norm",
    "perf/tokens_per_sec",
    "perf/mfu",
    "perf/step_seconds",
    "perf/data_wait",
    "memory/device_gib",
    "memory/device_reserved_gib",
    "memory/host_gib",
    "data/packing_efficiency",
    "data/imbalance",
)
# Followed by the dataset's name; loss/mse_t/ by a band of timesteps.
METRIC_PREFIXES = ("loss/mse/", "loss/ce/", "loss/mse_t/", "data/epoch/", "data/skipped/")
