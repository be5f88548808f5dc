"""Pictures and answers, on several GPUs too: `deepspeed --num_gpus 4 launch/generate.py --prompts FILE [arguments]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where the package is not installed

from bagel_ds.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
