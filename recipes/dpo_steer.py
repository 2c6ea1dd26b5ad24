"""Train steering vectors by preferences between two answers to a problem."""

import sys

from steer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--method", "dpo", *sys.argv[1:]]))
