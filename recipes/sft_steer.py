"""Train steering vectors by supervised learning on answers to problems."""

import sys

from steer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--method", "sft", *sys.argv[1:]]))
