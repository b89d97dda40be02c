"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightsmith.weights import _execute, _lazy, _save

# The tensors of tests are small: threads inside PyTorch cost more than they bring, the more so beside xdist's.
torch.set_num_threads(1)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 elements and units of 32, so that small tensors are cut as large ones are."""
    for module in (_lazy, _execute, _save):
        monkeypatch.setattr(module, "CHUNK", 16)
    for module in (_lazy, _save):
        monkeypatch.setattr(module, "UNIT", 32)


LETTERS = "abcdefgh üß€"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """See `small_llama`; each test has its own."""
    return small_llama(tmp_path)


@pytest.fixture(scope="module")
def shared_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `small_llama`; for tests that only read it."""
    return small_llama(tmp_path_factory.mktemp("llama"))


def small_llama(folder: Path) -> Path:
    """A folder with a tiny Llama of two layers, a tokenizer of one token a letter, and two texts."""
    transformers = pytest.importorskip("transformers", reason="builds Hugging Face models")
    tokenizers = pytest.importorskip("tokenizers", reason="builds Hugging Face tokenizers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = {letter: i for i, letter in enumerate(LETTERS)} | {"?": 12}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(folder / "model")
    for name, step in (("near", 7), ("far", 5)):
        text = "".join(LETTERS[(step * i * i + 3 * i) % len(LETTERS)] for i in range(400))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder / "model"
