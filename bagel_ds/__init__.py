"""bagel_ds: fine-tune BAGEL-7B-MoT with the DeepSpeed engine on the GPUs you own."""

__version__ = "0.1.0"
