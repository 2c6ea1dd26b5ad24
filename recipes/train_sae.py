"""Train sparse autoencoders on the activations of any causal language model, steered or not."""

import sys

from steer.cli import main

if __name__ == "__main__":
    sys.exit(main(["sae", "train", *sys.argv[1:]]))
