"""The parts of a layer that multiply no matrices: RMSNorm, the rotary embedding and the product in SwiGLU.

Their forward and backward passes are functions of tensors, by torch's own kernels (`eager.py`) or each fused into one
or two kernels (`fused.py`). Autograd functions of `layers.py` and `embeddings.py` call them and decide what is kept for
the backward pass, so that it is the same with both. Begin with `kernels.py`; `choice.py` tries them for a run.
"""
