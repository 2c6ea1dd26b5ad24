"""Studies of this project: which models work, speed, SAE tables, transfer. Nothing imports them."""

from steer.threads import prepare_environment

prepare_environment()
