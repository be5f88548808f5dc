"""What a machine must have before work begins. `environment.py` looks; whoever asked decides what to do about it."""
