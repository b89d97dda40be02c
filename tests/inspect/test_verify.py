"""Damage of every kind ends in findings that name file and tensor; several at once; never an exception."""

from __future__ import annotations

import json
import math
import os
import pickle

import pytest
import torch

from weightsmith.inspect import verify
from weightsmith.weights import Weights


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"h.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(4)}


@pytest.fixture
def sharded(tmp_path):
    """Four tensors in four shards with an index."""
    Weights.of(tensors()).save(tmp_path / "model", max_shard_size=300, threads=1)
    return tmp_path / "model"


def shard(folder, number):
    return folder / f"model-{number:05d}-of-00004.safetensors"


def found(path, severity="error"):
    return [(f.file, f.tensor, f.message) for f in verify(path, threads=1).findings if f.severity == severity]


def edit_index(folder, change):
    place = folder / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    change(index)
    place.write_text(json.dumps(index))


def test_a_sound_checkpoint_has_no_findings(sharded):
    result = verify(sharded)
    assert result.ok
    assert result.findings == ()
    assert (result.files, result.tensors, result.bytes) == (4, 4, 4 * 256)


def test_several_damages_are_reported_at_once(sharded):
    os.truncate(shard(sharded, 1), 4096 + 100)
    shard(sharded, 2).unlink()
    shard(sharded, 3).write_bytes(b"")
    messages = {file: message for file, _, message in found(sharded)}
    assert "truncated" in messages[shard(sharded, 1).name]
    assert "missing; it holds h.1.weight" in messages[shard(sharded, 2).name]
    assert "file is empty" in messages[shard(sharded, 3).name] or "too few" in messages[shard(sharded, 3).name]
    assert not verify(sharded).ok


def test_an_index_that_promises_what_is_not_there(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update({"ghost": shard(sharded, 2).name}))
    assert found(sharded)[0][0] == shard(sharded, 2).name
    assert "promises ghost" in found(sharded)[0][2]


def test_an_index_that_forgets_a_tensor_or_a_shard_or_lies_about_the_size(sharded):
    def change(index):
        del index["weight_map"]["h.3.weight"]
        index["metadata"]["total_size"] = 5

    edit_index(sharded, change)
    warnings = {file: message for file, _, message in found(sharded, "warning")}
    assert "not part of the checkpoint" in warnings[shard(sharded, 4).name]
    assert "total_size is 5" in warnings["model.safetensors.index.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "[" * 100_000])
def test_a_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert found(sharded)[0][0] == "model.safetensors.index.json"


def test_numbered_shards_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert verify(sharded).ok
    shard(sharded, 2).unlink()
    shard(sharded, 3).unlink()
    assert "shards 2, 3 of 4 of model are missing" in found(sharded)[0][2]


def test_one_tensor_in_two_shards(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    shard(sharded, 2).write_bytes(shard(sharded, 1).read_bytes())
    assert "'h.0.weight' is in both" in found(sharded)[0][2]


def test_values_that_are_not_finite(tmp_path):
    bad = tensors()
    bad["h.1.weight"][0, 0] = math.nan
    bad["h.1.weight"][0, 1:3] = math.inf
    bad["attn.mask"] = torch.tensor([0.0, -math.inf])
    Weights.of(bad).save(tmp_path / "w.safetensors")
    assert found(tmp_path / "w.safetensors") == [("w.safetensors", "h.1.weight", "1 NaN and 2 infinite of 64 values")]
    assert found(tmp_path / "w.safetensors", "note")[0][1] == "attn.mask"


def test_constant_tensors(tmp_path):
    odd = tensors() | {"zero.weight": torch.zeros(3, 3), "norm.weight": torch.ones(4), "count": torch.tensor([1, 1])}
    Weights.of(odd).save(tmp_path / "w.safetensors")
    result = verify(tmp_path / "w.safetensors")
    assert result.ok
    assert [(f.severity, f.tensor) for f in result.findings] == [("warning", "zero.weight"), ("note", "")]
    assert "norm.weight" in result.findings[1].message
    assert "count" not in result.findings[1].message


def test_a_file_that_is_nothing(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(os.urandom(500))
    assert not verify(tmp_path / "w.safetensors").ok
    assert found(tmp_path / "nowhere") == [("nowhere", "", "no such file or folder")]
    (tmp_path / "empty").mkdir()
    assert "no weights in this folder" in found(tmp_path / "empty")[0][2]


def test_a_pickle_that_would_run_code_is_a_finding_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "w.bin").write_bytes(pickle.dumps(Evil()))
    torch.save({"w": Evil()}, tmp_path / "x.pt")
    assert not verify(tmp_path / "w.bin").ok
    assert not verify(tmp_path / "x.pt").ok
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("seed", range(30))
def test_flipped_and_cut_bytes_never_raise(tmp_path, seed):
    Weights.of(tensors()).save(tmp_path / "w.safetensors")
    raw = bytearray((tmp_path / "w.safetensors").read_bytes())
    end = 8 + raw.index(b"}}") + 2  # where the header ends and only padding and values follow
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(0, end, (4,), generator=generator).tolist():
        raw[place] ^= 1 << (seed % 8)
    length = int(torch.randint(1, len(raw), (1,), generator=generator)) if seed % 2 else len(raw)
    (tmp_path / "w.safetensors").write_bytes(raw[:length])
    result = verify(tmp_path / "w.safetensors", threads=1)
    if seed % 2:
        assert not result.ok


def test_config_against_tensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "model.embed_tokens.weight": torch.randn(10, 4, generator=generator),
        "lm_head.weight": torch.randn(10, 4, generator=generator),
    }
    folder = tmp_path / "model"
    Weights.of(weights).save(folder)

    def config(**settings):
        (folder / "config.json").write_text(json.dumps(settings))
        return verify(folder).findings

    assert config(vocab_size=10, tie_word_embeddings=False, dtype="float32") == ()
    (tie,) = config(tie_word_embeddings=True)
    assert (tie.severity, tie.tensor) == ("warning", "lm_head.weight")
    (short,) = config(vocab_size=12)
    assert (short.severity, short.message) == ("error", "vocab_size is 12, the embedding has 10 rows")
    assert config(vocab_size=8)[0].severity == "note"
    assert config(text_config={"vocab_size": 12})[0].severity == "error"
    assert "bfloat16" in config(torch_dtype="bfloat16")[0].message
    (folder / "config.json").write_text("{nonsense")
    assert [(f.severity, f.file) for f in verify(folder).findings] == [("error", "config.json")]


def test_a_head_equal_to_the_embedding_may_be_tied(tmp_path):
    values = torch.randn(10, 4)
    folder = tmp_path / "model"
    Weights.of({"wte.weight": values, "lm_head.weight": values.clone()}).save(folder)
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    assert verify(folder).findings == ()


def test_an_interrupted_save_beside_it(sharded):
    (sharded.parent / "model.partial").mkdir()
    assert found(sharded, "warning") == [
        ("model.partial", "", "an interrupted save of this checkpoint: finish it with --resume, or remove it")
    ]


def test_formats_side_by_side(sharded):
    torch.save(tensors(), sharded / "pytorch_model.bin")
    torch.save({"lr": 0.1}, sharded / "training_args.bin")
    result = verify(sharded)
    assert result.ok
    assert ["several formats" in f.message for f in result.findings] == [True]


def test_everything_is_plain_data(sharded):
    shard(sharded, 2).unlink()
    data = json.loads(json.dumps(verify(sharded).to_json()))
    assert data["ok"] is False
    assert set(data["findings"][0]) == {"severity", "message", "file", "tensor"}


def test_a_report_says_the_same(tmp_path):
    Weights.of({"w": torch.tensor([[1.0, float("nan")]])}).save(tmp_path / "w.safetensors")
    found = verify(tmp_path / "w.safetensors")
    report = found.report()
    assert (report.figures["sound"], report.figures["errors"]) == (False, 1)
    assert report["message"] == [finding.message for finding in found.findings]
    assert "Nothing is wrong" not in str(report)
    Weights.of({"w": torch.eye(2)}).save(tmp_path / "good.safetensors")
    assert "Nothing is wrong" in str(verify(tmp_path / "good.safetensors").report())
