"""Train many sets of steering vectors at once on one frozen model: every layer, rates, seeds, controls."""

from steer.threads import prepare_environment

if __name__ == "__main__":
    prepare_environment()
    from steer.cli.layer_sweep import main
    from steer.training.recipe import start

    start(main)
