"""What outlives the process: model folders and training state, as files and flat ranges. Knows no DeepSpeed."""
