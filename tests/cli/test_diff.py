"""``weightsmith diff``: exit status, order, and what is listed."""

from __future__ import annotations

import json

import pytest
import torch

import weightsmith
from weightsmith.weights import Weights


def test_the_same(run, model, tmp_path):
    assert run("convert", model, "-o", tmp_path / "copy.pt")[0] == 0
    status, out, _ = run("diff", model, tmp_path / "copy.pt", "--changed")
    assert (status, out) == (0, "the same: 4 tensors, bit for bit\n")


def test_different(run, model, tuned):
    status, out, _ = run("diff", model, tuned, "--changed")
    assert status == 1
    head, row, _, conclusion = out.splitlines()
    assert head.split() == ["tensor", "status", "distance", "cosine", "largest", "changed"]
    assert row.split()[:4] == ["h.1.fc.weight", "changed", "0.5", "1.000000"]
    assert row.split()[5] == "100%"
    assert conclusion.startswith("different: of 4 tensors, 1 changed; distance ")


def test_trouble(run, model, tmp_path):
    assert run("diff", model, tmp_path / "nowhere")[0] == 2
    assert run("diff", model)[0] == 2


@pytest.mark.parametrize("key", ["distance", "cosine", "largest", "changed"])
def test_the_most_different_first(run, model, tmp_path, key):
    weights = weightsmith.open(model)
    generator = torch.Generator().manual_seed(1)
    moved = {}
    for i, amount in enumerate([0.1, 2.0, 0.5]):
        noise = torch.zeros(8, 8)
        noise[: 2 + 2 * i] = amount * torch.randn(2 + 2 * i, 8, generator=generator)
        moved[f"h.{i}.fc.weight"] = weights[f"h.{i}.fc.weight"] + noise
    (weights | moved).save(tmp_path / "moved")
    rows = json.loads(run("diff", model, tmp_path / "moved", "--json", "--sort", key)[1])["tensors"]
    figures = [row[key] for row in rows]
    assert figures == sorted(figures, reverse=key != "cosine")
    assert len(set(figures)) == 4
    assert [row["name"] for row in rows] != [row["name"] for row in sorted(rows, key=lambda row: row["name"])]


def test_json(run, model, tuned):
    status, out, _ = run("diff", model, tuned, "--json", "--changed", "--pattern", "h.*")
    data = json.loads(out)
    assert status == 1
    assert (data["same"], data["counts"]) == (False, {"same": 2, "changed": 1})
    assert [row["name"] for row in data["tensors"]] == ["h.1.fc.weight"]
    assert data["tensors"][0]["distance"] == pytest.approx(0.5, abs=1e-6)


def test_shapes_and_names(run, model, tmp_path):
    weights = weightsmith.open(model)
    (weights.drop("h.2.*") | {"new": torch.ones(1), "wte.weight": torch.ones(3, 4)}).save(tmp_path / "other")
    _, out, _ = run("diff", model, tmp_path / "other", "--changed")
    assert "float32[10, 4] / float32[3, 4]" in out
    assert "only in a" in out
    assert out.splitlines()[-1].startswith("different: of 5 tensors, 1 of another shape, 1 only in A, 1 only in B")


def test_many_tensors_are_shown_by_layer(run, tmp_path):
    tensors = {f"h.{i // 3}.w{i % 3}": torch.ones(2) for i in range(120)}
    Weights.of(tensors).save(tmp_path / "a.npz")
    Weights.of(tensors | {"h.5.w1": torch.tensor([1.0, 2.0])}).save(tmp_path / "b.npz")
    _, out, _ = run("diff", tmp_path / "a.npz", tmp_path / "b.npz")
    assert ["h.5", "1", "of", "3"] in [line.split()[:4] for line in out.splitlines()]
    assert "h.5.w1" not in out
    changed = run("diff", tmp_path / "a.npz", tmp_path / "b.npz", "--layers", "--changed")[1]
    assert [line.split()[0] for line in changed.splitlines()[:2]] == ["layer", "h.5"]
    assert "h.5.w1" in run("diff", tmp_path / "a.npz", tmp_path / "b.npz", "--all")[1]
