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


LETTERS = "abcdefgh üß€"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with a tiny Llama of two layers, a tokenizer of one token a letter, and two texts."""
    transformers = pytest.importorskip("transformers", reason="builds Hugging Face models")
    tokenizers = pytest.importorskip("tokenizers", reason="builds Hugging Face tokenizers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = {letter: i for i, letter in enumerate(LETTERS)} | {"?": 12}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(tmp_path / "model")
    for name, step in (("near", 7), ("far", 5)):
        text = "".join(LETTERS[(step * i * i + 3 * i) % len(LETTERS)] for i in range(400))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "model"
