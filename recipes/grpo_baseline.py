"""Train what steering vectors are compared with: a full fine-tune, or LoRA, BEFT or TinyLoRA of peft."""

from steer.threads import prepare_environment

if __name__ == "__main__":
    prepare_environment()
    from steer.cli.train_baseline import main
    from steer.training.recipe import start

    start(main)
