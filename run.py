"""What `accelerate launch` starts: parse, load the recipe, train, exit code.

    accelerate launch run.py recipes/smollm2-135m-lora.yaml [section.key=value ...] [--resume]
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="a file in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args()

    from lora_recipes.train import launch

    return launch(args.recipe, args.overrides, resume=args.resume, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
