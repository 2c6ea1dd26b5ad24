"""Train and measure vectors, full fine-tuning, other methods and controls, and write tables and a page."""

import sys

from steer.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
