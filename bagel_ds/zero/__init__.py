"""The only package that knows DeepSpeed."""
