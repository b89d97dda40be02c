"""What a save would do, against what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error, OutputError
from weightsmith.weights import Planned, Weights, _save, open


def some(seed: int = 0, count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(20, 50 + i, generator=generator) for i in range(count)}


@pytest.fixture
def models(tmp_path: Path) -> list[Weights]:
    for seed in range(3):
        Weights.of(some(seed)).save(tmp_path / f"m{seed}.safetensors")
    return [open(tmp_path / f"m{seed}.safetensors") for seed in range(3)]


VALUES = sum(tensor.nbytes for tensor in some().values())


def test_what_is_planned_is_what_is_written(models: list[Weights], tmp_path: Path) -> None:
    merged = ws.merge.mean(models).with_files({"config.json": b"{}"})
    for place, options in [("a.safetensors", {}), ("folder", {}), ("shards", {"max_shard_size": 9000}), ("n.npz", {})]:
        plan = merged.planned(tmp_path / place, **options)
        assert not (tmp_path / place).exists()
        saved = merged.save(tmp_path / place, **options)
        made = tmp_path / place
        files = [made] if made.is_file() else [file for file in made.rglob("*") if file.is_file()]
        assert plan.writes == sum(file.stat().st_size for file in files)
        assert plan.files == saved.files
        assert plan.tensors == saved.tensors == 4
        assert {file.name for file in files} == {Path(name).name for name in plan.files}


def reading(monkeypatch: pytest.MonkeyPatch, weights: Weights, place: Path) -> int:
    """Bytes that a save reads."""
    from weightsmith.weights._files import LocalFile

    total = 0
    real = LocalFile.read_into

    def counted(self: LocalFile, offset: int, buffer: memoryview) -> None:
        nonlocal total
        total += len(buffer)
        real(self, offset, buffer)

    _save.laid_out(weights, "safetensors", "x", None)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFile, "read_into", counted)
        patch.setattr(_save._lineage, "written", lambda step: {})  # its samples are no values
        weights.save(place, threads=1)
    return total


def test_reads_are_counted_for_every_pass(
    models: list[Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tunes = models
    cases: list[tuple[Weights, int, int]] = [
        (models[0], 1, 1), (ws.merge.mean(models), 3, 1), (models[0] + models[0], 1, 1),
        (ws.merge.model_stock(tunes, base), 6, 2),
        (Weights.of(some()) * 2, 0, 1), (models[0] + Weights.of(some()), 1, 1), (models[0].select("t0"), 0, 1),
    ]  # fmt: skip
    for number, (weights, times, passes) in enumerate(cases):
        plan = weights.planned(tmp_path / "x.safetensors")
        assert plan.passes == passes
        assert not plan.passes_at_least
        if number == 6:
            assert plan.reads == weights.nbytes
            continue
        assert plan.reads == times * VALUES
        if number not in (2, 7):  # the same bytes are read twice there, the second time from the cache
            assert reading(monkeypatch, weights, tmp_path / f"{number}.safetensors") == plan.reads


def test_a_method_that_decides_on_the_way(models: list[Weights], tmp_path: Path) -> None:
    plan = ws.merge.ties(models[1:], models[0], density=0.5).planned(tmp_path / "x")
    assert plan.passes == 2
    assert plan.passes_at_least
    assert plan.reads == 2 * 3 * VALUES


def test_what_is_solved_is_not_read_again(models: list[Weights], tmp_path: Path) -> None:
    merged = ws.merge.model_stock(models[1:], models[0])
    assert merged.planned(tmp_path / "x").passes == 2
    merged.to_dict()
    assert merged.planned(tmp_path / "x").passes == 1
    assert merged.planned(tmp_path / "x").reads == 3 * VALUES


def test_memory(tmp_path: Path) -> None:
    weights = Weights.of({"a": torch.zeros(3000, 1000)})
    chunks = weights.map(torch.neg)
    whole = weights.map(torch.neg, unit="tensor")

    def memory(weights: Weights, **options: Any) -> int:
        return weights.planned(tmp_path / "x", **options).memory

    assert memory(chunks, threads=1) < 12_000_000 < memory(whole, threads=1)
    assert memory(chunks, threads=4) == 4 * memory(chunks, threads=1)
    assert memory(chunks, threads=4, memory=2 * memory(chunks, threads=1)) == 2 * memory(chunks, threads=1)
    assert memory(whole, threads=4, memory="1MB") == memory(whole, threads=1), "the largest needs what it needs"


def test_what_a_save_would_refuse(models: list[Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = ws.merge.mean(models)
    before = {path.name for path in tmp_path.iterdir()}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("m1.safetensors", {"overwrite": True}, "is an input of this save"), ("m1.safetensors", {}, "is an input"),
        ("a.gguf", {}, "cannot write gguf"), ("a", {"format": "onnx"}, "cannot write the format"),
        ("a", {"threads": 0}, "threads must be"), ("a", {"memory": "much"}, "no size"),
    ]  # fmt: skip
    for place, options, message in cases:
        with pytest.raises(Error, match=message):
            merged.planned(tmp_path / place, **options)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.safetensors").touch()
    with pytest.raises(OutputError, match="exists"):
        merged.planned(tmp_path / "taken")
    assert isinstance(merged.planned(tmp_path / "taken", overwrite=True), Planned)
    usage = _save.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_save.shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(OutputError, match="the disk has 5,000 free"):
        merged.planned(tmp_path / "b")
    assert Weights.of({"a": torch.zeros(1)}).planned(tmp_path / "deep" / "b.npz").free == 5000
    assert {path.name for path in tmp_path.iterdir()} == before | {"taken"}


def test_far_away(models: list[Weights]) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec")
    place = "memory://planned/out.safetensors"
    plan = ws.merge.mean(models).planned(place)
    assert plan.files == ("out.safetensors",)
    fsspec.filesystem("memory").pipe("/planned/out.safetensors", b"mine")
    with pytest.raises(OutputError, match="exists"):
        ws.merge.mean(models).planned(place)
    assert ws.merge.mean(models).planned(place, overwrite=True).reads == 3 * VALUES
