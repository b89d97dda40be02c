"""Texts under language models: the losses of transformers, divergences by hand, answers that are kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith import language as models_of
from weightsmith.errors import Error
from weightsmith.inspect import _twin
from weightsmith.inspect._language import language

LETTERS = "abcdefgh üß€"
TEXT = "".join(LETTERS[(7 * i * i + 3 * i) % len(LETTERS)] for i in range(400))
OTHER = "".join(LETTERS[(5 * i * i + i) % len(LETTERS)] for i in range(100))


def write_tokenizer(folder: Path, letters: str = LETTERS) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)} | {"?": 12}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Make a tiny Llama with a tokenizer of one token a letter."""
    pytest.importorskip("transformers", reason="builds Hugging Face models")
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(name: str, seed: int, letters: str = LETTERS) -> tuple[Path, Any]:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, letters)
        return tmp_path / name, model

    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(OTHER, encoding="utf-8")
    return make


def windows_of(text: str, length: int) -> list[torch.Tensor]:
    ids = [LETTERS.index(letter) for letter in text]
    return [torch.tensor([ids[s : s + length]]) for s in range(0, len(ids) // length * length, length)]


@torch.no_grad()
def logs_of(model: Any, window: torch.Tensor) -> torch.Tensor:
    return model(input_ids=window).logits[0, :-1].double().log_softmax(dim=1)


def test_losses_are_those_of_transformers(folders, tmp_path: Path):
    place, model = folders("a", 0)
    found = language([place], {"t": tmp_path / "text.txt", "o": tmp_path / "other.txt"}, length=20, windows=None)
    for text, nats, tokens in zip((TEXT, OTHER), found["nats"], found["tokens"], strict=True):
        windows = windows_of(text, 20)
        with torch.no_grad():
            own = [float(model(input_ids=w, labels=w).loss) for w in windows]
        assert nats == pytest.approx(sum(own) / len(own), abs=1e-4)
        assert tokens == 19 * len(windows)
    assert found["perplexity"][0] == pytest.approx(math.exp(found["nats"][0]))
    low, high = found["nats low"][0], found["nats high"][0]
    assert low < found["nats"][0] < high
    assert "ratio" not in found.table[0]
    assert "KL" not in found.table[0]


def test_bits_per_byte_count_bytes_and_not_letters(folders, tmp_path: Path):
    place, _ = folders("a", 0)
    found = language([place], [tmp_path / "text.txt"], length=20, windows=None)
    nats = found["nats"][0] * found["tokens"][0]
    scored = "".join(TEXT[s + 1 : s + 20] for s in range(0, 400, 20))  # the first token of a window is not predicted
    assert len(scored.encode()) > len(scored)
    assert found["bits per byte"][0] == pytest.approx(nats / math.log(2) / len(scored.encode()))


def test_divergence_and_agreement_by_hand(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models_of, "ROWS", 7)  # several pieces a window
    (first, one), (second, two) = folders("a", 0), folders("b", 1)
    found = language({"b": second, "a": first}, [tmp_path / "text.txt"], first, length=20, windows=None)
    divergence, agree, tokens, losses = 0.0, 0, 0, [0.0, 0.0]
    for window in windows_of(TEXT, 20):
        said, own = logs_of(one, window), logs_of(two, window)
        divergence += float((said.exp() * (said - own)).sum())
        agree += int((said.argmax(1) == own.argmax(1)).sum())
        tokens += len(said)
        for i, logs in enumerate((said, own)):
            losses[i] -= float(logs.gather(1, window[0, 1:, None]).sum())
    assert found["KL"][0] == pytest.approx(divergence / tokens, rel=2e-3)
    assert found["agreement"][0] == agree / tokens
    assert found["ratio"][0] == pytest.approx(math.exp((losses[1] - losses[0]) / tokens), rel=1e-4)
    assert found["KL low"][0] < found["KL"][0] < found["KL high"][0]
    # The reference itself.
    assert found["KL"][1] == pytest.approx(0, abs=1e-6)
    assert found["KL"][1] >= 0
    assert (found["agreement"][1], found["ratio"][1]) == (1, pytest.approx(1, abs=1e-5))
    assert {plot.y for plot in found.plots} >= {"perplexity", "same likeliest token"}


def test_the_reference_is_asked_once(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (first, _), (second, _) = folders("a", 0), folders("b", 1)
    built: list[Any] = []
    original = models_of.with_weights
    monkeypatch.setattr(models_of, "with_weights", lambda *given: built.append(1) or original(*given))
    options: dict[str, Any] = {"length": 20, "windows": 5, "cache": tmp_path / "kept"}
    once = language([second], [tmp_path / "text.txt"], first, **options)
    assert len(built) == 2
    again = language([second], [tmp_path / "text.txt"], first, **options)
    assert len(built) == 3
    assert again.to_json() == once.to_json()
    (key,) = (tmp_path / "kept").iterdir()
    # Another text, other windows, other weights are other questions; half an answer is none.
    language([second], [tmp_path / "other.txt"], first, **options)
    language([second], [tmp_path / "text.txt"], first, **options | {"windows": 4})
    changed = ws.open(first) | {"model.norm.weight": torch.zeros(16)}
    language([second], [tmp_path / "text.txt"], changed, **options)
    assert len(built) == 3 + 6
    (key / "twin.json").unlink()
    assert language([second], [tmp_path / "text.txt"], first, **options).to_json() == once.to_json()
    assert len(built) == 11
    assert not list((tmp_path / "kept").glob("*.partial"))


def test_without_a_reference_models_are_compared_with_the_first(folders, tmp_path: Path):
    (first, _), (second, _), (third, _) = folders("a", 0), folders("b", 1), folders("c", 2, LETTERS[::-1])
    found = language([first, second, third], [tmp_path / "text.txt"], length=20, windows=None)
    assert found["ratio"][0] is None
    assert found["ratio"][1] == pytest.approx(found["perplexity"][1] / found["perplexity"][0])
    assert found["ratio low"][1] < found["ratio"][1] < found["ratio high"][1]
    assert found["ratio"][2] is None  # its tokens are others
    with pytest.raises(Error, match=r"cuts .* into other tokens than the reference"):
        language([third], [tmp_path / "text.txt"], first, length=20)


def test_quantized_weights_are_decoded(folders, tmp_path: Path):
    place, _ = folders("a", 0)
    made = ws.quantize.rtn(ws.open(place), bits=8, group=8)
    made.save(tmp_path / "small")
    found = language({"small": tmp_path / "small"}, [tmp_path / "text.txt"], place, length=20)
    assert 0 < found["KL"][0] < 0.01


def test_a_model_without_numbers_has_no_figures(folders, tmp_path: Path):
    place, _ = folders("a", 0)
    broken = ws.open(place) | {"model.norm.weight": torch.full((16,), math.nan)}
    found = language({"broken": broken, "whole": place}, [tmp_path / "text.txt"], place, length=20)
    assert found["perplexity"][0] is None
    assert found["KL"][0] is None
    assert found["perplexity"][1] is not None
    assert any("no number" in note for note in found.notes)
    assert found.draw()
    with pytest.raises(Error, match="reference gives no number"):
        language([place], [tmp_path / "text.txt"], broken, length=20)


def test_what_is_wrong_is_found_before_a_model_is_built(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place, _ = folders("a", 0)
    monkeypatch.setattr(models_of, "with_weights", None)
    with pytest.raises(Error, match="nowhere"):
        language([place, tmp_path / "nowhere"], [tmp_path / "text.txt"])
    with pytest.raises(Error, match=r"none\.txt"):
        language([place], [tmp_path / "none.txt"])
    with pytest.raises(Error, match="windows must be at least 1"):
        language([place], [tmp_path / "text.txt"], windows=0)
    with pytest.raises(Error, match="at least one model"):
        language([], [tmp_path / "text.txt"])
    with pytest.raises(Error, match="carry none"):
        language([{"w": torch.ones(2)}, place], [tmp_path / "text.txt"])
    with pytest.raises(Error, match="at least one text"):
        language([place], [])


def test_a_full_disk(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place, _ = folders("a", 0)
    monkeypatch.setattr(_twin.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))  # type: ignore[attr-defined]
    with pytest.raises(Error, match=r"takes .* and 100 B are free"):
        language([place], [tmp_path / "text.txt"], place, length=20, cache=tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_windows_of_few_say_so(folders, tmp_path: Path):
    place, _ = folders("a", 0)
    found = language([place], [tmp_path / "other.txt"], length=50)
    assert any("With 2 windows" in note for note in found.notes)
    assert not any("windows an interval" in n for n in language([place], [tmp_path / "text.txt"], length=20).notes)
