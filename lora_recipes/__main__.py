"""`python -m lora_recipes` is the command `lora-recipes`."""

import sys

from lora_recipes.cli import main

if __name__ == "__main__":
    sys.exit(main())
