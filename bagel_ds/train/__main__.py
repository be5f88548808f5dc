"""`deepspeed --module bagel_ds.train [arguments]`: the trainer without the repository."""

import sys

from bagel_ds.train.main import main

if __name__ == "__main__":
    sys.exit(main())
