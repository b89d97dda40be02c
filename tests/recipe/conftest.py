"""Small checkpoints on disk, and recipes about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weightsmith as ws


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(8, 4, generator=generator),
        "layers.0.w.weight": torch.randn(4, 4, generator=generator),
        "layers.1.w.weight": torch.randn(4, 4, generator=generator),
        "head.weight": torch.randn(8, 4, generator=generator),
    }


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints ``base/``, ``a/`` and ``b/``; it is the current one."""
    for seed, name in enumerate(("base", "a", "b")):
        config = {"config.json": json.dumps({"model_type": "tiny", "torch_dtype": "float32"}).encode()}
        ws.open(tensors(seed)).with_files(config).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(models: Path) -> Callable[[str], Path]:
    """Writes the text of a recipe to ``recipe.yaml``."""

    def write(text: str) -> Path:
        path = models / "recipe.yaml"
        path.write_text(text)
        return path

    return write
