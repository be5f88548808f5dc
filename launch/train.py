"""Started by the launcher: `deepspeed --num_gpus 4 launch/train.py --ds_config zero3.json [arguments]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

from bagel_ds.train.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
