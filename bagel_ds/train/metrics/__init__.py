"""What a run logs: metrics.jsonl, TensorBoard, Weights & Biases, the console.

Promises: one exchange between ranks per logged step, the same numbers everywhere, and no disk or service that fails
ends a run. May import data, model and `train/ranks`. Begin with meter.py, which makes the numbers (add a metric there,
and its name in tests/train/metrics/metric_names.py), then log.py, which writes them.
"""
