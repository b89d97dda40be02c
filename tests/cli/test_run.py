"""``weightsmith run`` and ``explain``: what is printed, what is made, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weightsmith

RECIPE = """
inputs: {base: BASE, tuned: TUNED}
steps:
  moved: {method: merge.wise_ft, models: [tuned], base: base, amount: 0.5}
  pruned: {method: prune.magnitude, sparsity: 0.5}
save: {OUT: pruned}
"""


@pytest.fixture
def recipe(model: Path, tuned: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("BASE", str(model)).replace("TUNED", str(tuned)).replace("OUT", str(tmp_path / "out"))
    path.write_text(text)
    return path


def expected(model: Path, tuned: Path, amount: float = 0.5) -> weightsmith.Weights:
    return weightsmith.prune.magnitude(weightsmith.merge.wise_ft([tuned], model, amount=amount), sparsity=0.5)


def equal(path: Path, weights: weightsmith.Weights) -> bool:
    found = weightsmith.open(path)
    return list(found) == list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)


def test_run(run, recipe, model, tuned, tmp_path):
    status, out, err = run("run", recipe)
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'out'}: 4 tensors")
    assert equal(tmp_path / "out", expected(model, tuned))
    status, _, err = run("run", recipe)
    assert status == 2
    assert "exists" in err
    assert run("run", recipe, "--overwrite", "--set", "moved.amount=1")[0] == 0
    assert equal(tmp_path / "out", expected(model, tuned, 1))


def test_another_place(run, recipe, model, tuned, tmp_path):
    assert run("run", recipe, "-o", tmp_path / "there.safetensors")[0] == 0
    assert not (tmp_path / "out").exists()
    assert equal(tmp_path / "there.safetensors", expected(model, tuned))


def test_dry_run_writes_nothing(run, recipe, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, out, _ = run("run", recipe, "--dry-run")
    assert status == 0
    assert "Nothing was written." in out
    assert sorted(tmp_path.rglob("*")) == before
    [planned] = json.loads(run("run", recipe, "--dry-run", "--json")[1])
    assert planned["tensors"] == 4
    assert planned["writes"] > 0
    assert planned["free"] > planned["writes"]


def test_a_sweep(run, recipe, model, tuned, tmp_path):
    (tmp_path / "score.py").write_text(
        "def count(weights):\n    return float(sum((w == 0).sum() for w in weights.values()))\n"
    )
    recipe.write_text(recipe.read_text() + f"evaluate: {{zeros: '{tmp_path / 'score.py'}:count'}}\n")
    report = tmp_path / "sweep.html"
    status, out, err = run("run", recipe, "--sweep", "pruned.sparsity=0.1,0.9,0.5", "--report", report)
    assert status == 0
    assert err.count("zeros") == 3  # as they come
    assert "kept: pruned.sparsity=0.9" in out
    assert "<svg" in report.read_text()
    found = json.loads(run("run", recipe, "--sweep", "pruned.sparsity=[0.1, 0.9]", "--overwrite", "--json")[1])
    assert found["kept"] == {"pruned.sparsity": 0.9}
    assert [row["values"] for row in found["measured"]] == [{"pruned.sparsity": 0.1}, {"pruned.sparsity": 0.9}]


def test_what_is_wrong(run, recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("wise_ft", "wise_tf"))
    status, out, err = run("run", recipe)
    assert (status, out) == (2, "")
    assert err.startswith(
        f"weightsmith: error: {recipe}:4:19: no method 'merge.wise_tf' (did you mean 'merge.wise_ft'?)"
    )
    assert run("run", tmp_path / "none.yaml")[0] == 2
    (tmp_path / "empty.yaml").write_text("")
    assert "is empty" in run("run", tmp_path / "empty.yaml")[2]


def test_explain(run, recipe):
    status, out, _ = run("explain", recipe)
    assert status == 0
    assert "wise_ft(amount=0.5)" in out
    assert "pruned: 4 tensors" in out
    found = json.loads(run("explain", recipe, "--of", "moved", "--json", "--set", "moved.amount=0.25")[1])
    assert [line["steps"] for line in found["moved"]] == [["wise_ft(amount=0.25)"]] * 4
    assert "no input or step 'nothing'" in run("explain", recipe, "--of", "nothing")[2]


def test_a_file_after_merge(run, recipe, model, tuned, tmp_path):
    assert run("merge", recipe)[0] == 0
    assert equal(tmp_path / "out", expected(model, tuned))
