"""Train steering vectors by reinforcement learning on math problems."""

import sys

from steer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
