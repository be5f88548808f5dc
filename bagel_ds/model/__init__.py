"""Pure torch: BAGEL's network, its VAE and the batch they read. Knows no DeepSpeed, no data files, no arguments."""
