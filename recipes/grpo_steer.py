"""Train steering vectors by reinforcement learning on math problems."""

from steer.threads import prepare_environment

if __name__ == "__main__":
    prepare_environment()
    from steer.cli.train import main
    from steer.training.recipe import start

    start(main)
