"""``weightsmith show`` on real files."""

from __future__ import annotations

import json
import math

import torch

import weightsmith
from weightsmith.weights import Weights


def test_tensors_and_totals(run, model):
    status, out, err = run("show", model)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{model}: 4 tensors, 232 parameters, 928 B, float32"
    assert lines[3].split() == ["wte.weight", "[10,", "4]", "float32", "160", "B"]
    assert len(lines) == 7


def test_json_is_one_document(run, model):
    _, out, _ = run("show", model, "--json", "--stats", "-p", "h.*", "--lineage")
    data = json.loads(out)
    assert [row["name"] for row in data["tensors"]] == [f"h.{i}.fc.weight" for i in range(3)]
    norm = float(weightsmith.open(model)["h.1.fc.weight"].norm())
    assert math.isclose(data["tensors"][1]["norm"], norm, rel_tol=1e-6)
    assert data["lineage"]["method"] == "open"


def test_stats_and_spectra(run, model):
    _, out, _ = run("show", model, "--stats", "--spectra", "--pattern", "wte*")
    head, row = out.splitlines()[2:4]
    assert head.split() == ["tensor", "shape", "norm", "mean", "std", "min", "max", "zeros", "nan", "inf"]
    values = weightsmith.open(model)["wte.weight"]
    assert row.split()[3:7] == [
        f"{x:.4g}" for x in (values.norm(), values.mean(), values.std(correction=0), values.min())
    ]
    assert out.splitlines()[-1].split()[4] == f"{torch.linalg.svdvals(values)[0]:.4g}"


def test_many_tensors_are_shown_by_layer(run, tmp_path):
    Weights.of({f"h.{i // 3}.w{i % 3}": torch.ones(2) for i in range(120)}).save(tmp_path / "w.npz")
    _, out, _ = run("show", tmp_path / "w.npz")
    assert out.splitlines()[3].split() == ["h.0", "3", "6", "24", "B", "float32"]
    assert "--all lists them one by one" in out
    assert "h.0.w1" not in out
    assert "h.39.w2" in run("show", tmp_path / "w.npz", "--all")[1]


def test_ties_and_lineage(run, tmp_path):
    shared = torch.ones(3)
    (2 * Weights.of({"a": shared, "b": shared})).save(tmp_path / "w.safetensors")
    out = run("show", tmp_path / "w.safetensors", "--lineage", "--all")[1]
    assert "b = a" in out
    assert "mul(number=2)" in out


def test_a_part_of_a_pytorch_file(run, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(9)}}, tmp_path / "run.ckpt")
    for arguments in ([f"{tmp_path}/run.ckpt::state_dict"], [tmp_path / "run.ckpt", "--at", "state_dict"]):
        assert "1 tensor, 2 parameters" in run("show", *arguments)[1]


def test_a_pattern_that_fits_nothing(run, model):
    status, _, err = run("show", model, "-p", "nothing*")
    assert status == 2
    assert "nothing*" in err
