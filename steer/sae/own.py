"""SAEs in steer's own format: `sae_config.json` and `model.safetensors`, in a folder or on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from steer import hub
from steer.card import MARK, PLACE, URL, front_matter
from steer.errors import SteerError, one_line
from steer.files import json_object, replace_files
from steer.sae.config import SAEConfig

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "sae_config.json", "model.safetensors", "README.md"


def write(
    folder: str | os.PathLike[str], config: SAEConfig, tensors: dict[str, Tensor], name: str = PLACE
) -> Path:
    """
    Write an SAE with a model card, all files or none.

    Args:
        folder: made if missing; a card of the user's own stays.
        config: of the SAE.
        tensors: its `state_dict()`.
        name: what the card's code calls the SAE, such as its id on the hub.

    Returns:
        The folder.

    Raises:
        SteerError: when the folder cannot be written.
    """
    path = Path(folder)
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    files = {
        path / WEIGHTS_FILE: content,
        path / CONFIG_FILE: json.dumps(config.to_dict(), indent=2).encode(),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        page = path / CARD_FILE
        if not page.exists() or MARK in page.read_text(errors="replace"):
            files[page] = card(config, name).encode()
        replace_files(files)
    except OSError as error:
        raise SteerError(f"cannot save the SAE to {path}: {one_line(error)}") from error
    return path


def read(
    name_or_path: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> tuple[SAEConfig, dict[str, Tensor], Path]:
    """
    The config and the weights of an SAE.

    Args:
        name_or_path: folder or hub id.
        revision: branch, tag or commit of a hub id.
        token: for private repositories, by default that of `hf auth login`.

    Returns:
        Config, tensors by name, and the folder that they lie in.

    Raises:
        SteerError: when there are no such files, or they are damaged.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        hub.refuse_revision(folder, revision)
    else:
        if not hub.is_hub_id(str(name_or_path)):
            raise SteerError(
                f"no SAE at {name_or_path}: there is no such folder; a hub id looks like user/name"
            )
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            folder = hub.fetch(str(name_or_path), file, revision, token).parent
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise SteerError(
            f"{folder} holds no {CONFIG_FILE} and {WEIGHTS_FILE}; steer.sae.load_sae reads other tools' files"
        )
    try:
        values = json_object((folder / CONFIG_FILE).read_bytes(), folder / CONFIG_FILE)
        tensors = load((folder / WEIGHTS_FILE).read_bytes())
    except SteerError:
        raise
    except Exception as error:  # safetensors raises kinds of its own
        raise SteerError(
            f"{folder} holds a damaged SAE ({one_line(error)}); fetch or write it again"
        ) from error
    check_finite(tensors, folder)
    try:
        return SAEConfig.from_dict(values), tensors, folder
    except SteerError as error:
        raise SteerError(f"{folder}: {error}") from error


def check_finite(tensors: Mapping[str, object], where: Path) -> None:
    """SteerError unless all are tensors of finite numbers."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or (value.is_floating_point() and not torch.isfinite(value).all()):
            raise SteerError(f"{where}: {name} is not a tensor of finite numbers; fetch or write it again")


def card(config: SAEConfig, name: str = PLACE) -> str:
    """The model card: Markdown with YAML front matter."""
    source = config.source or {}
    base = source.get("model")
    rows = {
        "base model": base and f"`{base}`",
        "base revision": source.get("base_revision") and f"`{source['base_revision']}`",
        "base adapter": source.get("base_adapter") and f"`{source['base_adapter']}`, merged",
        "activations": "site" in source and f"`{source['site']}` of layer {source.get('layer')}",
        "size": f"{config.d_sae:,} features for activations of {config.d_in:,} numbers",
        "variant": f"{config.encoder} encoder, {config.variant}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    metadata = front_matter(str(base) if base else None, "sparse-autoencoder", "interpretability")
    return f"""{metadata}

{MARK}

# A sparse autoencoder of {base or "a language model"}

| | |
|---|---|
{table}

## Use

```bash
pip install steer-rl
```

```python
from steer.sae import SAE

sae = SAE.from_pretrained("{name}")
```

Made with [steer]({URL}).
"""
