"""What `accelerate launch` starts: parse, load the recipe, train, exit code.

accelerate launch run.py recipes/smollm2-135m-lora.yaml [section.key=value ...] [--fresh] [--fit]
"""

import sys

from lora_recipes.train import main

if __name__ == "__main__":
    sys.exit(main())
