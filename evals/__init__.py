"""Studies of this project: which models work, speed, SAE tables, transfer. Nothing imports them."""

import os

from steer.threads import passive_waiting

os.environ.update(passive_waiting())
