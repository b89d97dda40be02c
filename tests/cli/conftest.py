"""Checkpoints to run commands on, and ways to run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weightsmith
from weightsmith.cli import main
from weightsmith.weights import Weights

SOURCE = str(Path(weightsmith.__file__).parents[1])


@pytest.fixture
def model(tmp_path):
    """A folder with config, three layers and an embedding."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"wte.weight": torch.randn(10, 4, generator=generator)}
    tensors |= {f"h.{i}.fc.weight": torch.randn(8, 8, generator=generator) for i in range(3)}
    files = {"config.json": b'{"dtype": "float32"}'}
    Weights.of(tensors).with_files(files).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tuned(model, tmp_path):
    """The same with one matrix moved."""
    weights = weightsmith.open(model)
    moved = weights | {"h.1.fc.weight": weights["h.1.fc.weight"] * 1.5}
    moved.save(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.fixture
def run(capsys):
    """Run the command line in this process: status, standard output, standard error."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def shell():
    """Run the command line in a process of its own."""

    def call(*arguments, code=None, env=None, **options):
        command = [sys.executable, *(["-c", code] if code else ["-m", "weightsmith"]), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": SOURCE} | (env or {})
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)

    return call
