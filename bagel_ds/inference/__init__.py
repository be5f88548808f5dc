"""Pictures and answers from a BAGEL network, with the layers that training uses.

`setup_models(path)` loads a model folder and makes `inferencer` ready; `inferencer.generate(prompt=...)` draws, edits
and answers, also many prompts in one batch. Promises: a result depends on its own prompt, settings and seed, not on the
prompts beside it; every tensor of the network comes from the folder. Imports data, model_folder and model; knows
neither DeepSpeed nor training, which is handed a sampler instead. Begin reading in `generation.py`: its `Inferencer` is
made of `network.py` (calls with a KV cache), `text.py` (tokens), `sampler.py` (images) and `reasoning.py` (both in
turn).
"""

from bagel_ds.inference.default import inferencer, setup_models

__all__ = ["inferencer", "setup_models"]
