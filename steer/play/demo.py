"""The vectors of `steer play --demo`, which are for the bundled SmolLM2-135M-Instruct."""

from __future__ import annotations

from pathlib import Path

from steer.artifact import Artifact, read
from steer.errors import SteerError

MODEL = "smollm2-135m-instruct"
STRENGTHS = {"cheerful": 0.0}  # where the sliders stand first, 1 for the others
MESSAGES = ("What is 7 * 8?", "What is 6 + 9?", "How was your day?", "Tell me about the sea.")
_PACKAGE = Path(__file__).resolve().parent


def demo_artifacts() -> tuple[dict[str, Artifact], str]:
    """
    The sets by name, and what they are, in Markdown: the vectors of `make demo`, from `runs/demo` where that
    has run in this folder, else those that come with steer; and a set of `steer extract`.

    Raises:
        SteerError: the package has lost its vectors.
    """
    own = Path("runs/demo/vectors")
    # A clone has the vectors among its results, an installed package in itself.
    places = [own, _PACKAGE / "vectors" / "arithmetic", _PACKAGE.parents[1] / "evals/results/demo/vectors"]
    found = next((place for place in places if (place / "steering.safetensors").is_file()), None)
    if found is None:
        raise SteerError("this steer has no demo vectors; install it again: pip install steer-rl")
    origin = "of your `runs/demo`" if found == own else "that come with steer"
    about = (
        f"**arithmetic**: the vectors {origin}, trained by reinforcement learning on sums and products of "
        "one-digit numbers (`make demo`). **cheerful**: mean difference of 16 cheerful and 16 gloomy "
        "sentences in layers 12 to 18 (`steer extract pairs`), without training; it starts switched off."
    )
    return {"arithmetic": read(found), "cheerful": read(_PACKAGE / "vectors" / "cheerful")}, about
