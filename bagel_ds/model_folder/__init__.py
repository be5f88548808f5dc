"""A folder laid out like BAGEL-7B-MoT: its configuration, its weights, its autoencoder and its tokenizer.

Promises: a file that is missing, damaged or of another model is one message that names it, before training begins;
weights are mapped and read by range, so nobody holds a whole model; no parameter is left random silently; token ids are
the original's. May import `model`, `ranges`, `machine`, `config_files`, `git_lfs`, `errors` and `units`. Begin with
folder.py (`ModelFolder`). weights.py gives every parameter of the network, pretrained.py does so from a separate
language model and ViT, autoencoder.py loads the VAE, tokenizer.py the tokenizer, tensor_files.py reads and writes
safetensors, average.py chooses between the two weight files, finite.py looks for NaN.
"""
