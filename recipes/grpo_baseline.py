"""Train what steering vectors are compared with: a full fine-tune, or LoRA, BEFT or TinyLoRA of peft."""

import sys

from steer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-baseline", *sys.argv[1:]]))
