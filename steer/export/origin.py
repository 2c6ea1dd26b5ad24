"""What an artifact's provenance says of the file that its vectors were imported from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PART = "import"  # of the provenance


def origin(kind: str, path: Path, base_model: object = None) -> dict[str, Any]:
    """
    The provenance of vectors that another tool wrote.

    Args:
        kind: format of the file, as `steer import --format` names it.
        path: the file or folder that was read.
        base_model: name of the model that the file says its vectors are for; None where it does not say.

    Returns:
        A part of a provenance, with `base_model` None where the origin is unknown.
    """
    name = os.fsencode(path.absolute().name).decode(errors="replace")
    named = base_model if isinstance(base_model, str) and base_model.isprintable() else None
    return {PART: {"format": kind, "file": name, "base_model": named or None}}
