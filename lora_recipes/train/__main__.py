"""`accelerate launch --module lora_recipes.train` is `accelerate launch run.py` without a checkout."""

import sys

from lora_recipes.train import main

if __name__ == "__main__":
    sys.exit(main())
