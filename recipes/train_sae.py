"""Train sparse autoencoders on the activations of any causal language model, steered or not."""

import sys

from steer.threads import prepare_environment

if __name__ == "__main__":
    prepare_environment()
    from steer.cli.train_sae import main
    from steer.training.recipe import start

    start(lambda: main(sys.argv[1:]))
