"""Adapters made of a few tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.weights import Weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(tensors: Mapping[str, Tensor], prefix: str = "base_model.model.", **settings: Any) -> Weights:
    """An adapter of rank 2 and alpha 3, unless said otherwise."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | settings
    named = Weights.of({prefix + name: value for name, value in tensors.items()})
    return named.with_files({"adapter_config.json": json.dumps(config).encode()})


def factors(module: str, out: int, into: int, rank: int = 2, seed: int = 1) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": random(rank, into, seed=seed),
        f"{module}.lora_B.weight": random(out, rank, seed=seed + 100),
    }


@pytest.fixture
def base() -> dict[str, Tensor]:
    """Two linear layers, one with a bias."""
    return {"fc.weight": random(5, 4), "fc.bias": random(5, seed=1), "out.weight": random(3, 5, seed=2)}
