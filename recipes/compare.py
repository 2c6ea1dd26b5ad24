"""Train and measure vectors, full fine-tuning, other methods and controls, and write tables and a page."""

import sys

from steer.threads import prepare_environment

if __name__ == "__main__":
    prepare_environment()
    from steer.cli.compare import main

    sys.exit(main())
