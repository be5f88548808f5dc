"""Adapters as weights and files: how they begin, how they are stored, and how they become part of a model.

Promises: adapters begin alike on any number of ranks; their folders are peft's, in both directions; merging adds in
fp32, rounds once and never holds the model. What an adapted layer computes is in `model/layers.py`, beside a base of 4
or 8 bits in `model/quantized.py`; which layers have one is in `model/shape/lora.py`. May import model_folder and what
lies below it; knows nothing of training. Begin with `weights.py`.
"""
