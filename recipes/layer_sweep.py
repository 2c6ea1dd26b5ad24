"""Train many sets of steering vectors at once on one frozen model: every layer, rates, seeds, controls."""

import sys

from steer.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
