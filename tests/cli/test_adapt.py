"""``weightsmith adapt`` does what the functions do."""

from __future__ import annotations

import json

import torch

import weightsmith as ws


def equal(path, weights):
    made = ws.open(path)
    assert set(made) == set(weights)
    assert all(torch.equal(made[name], weights[name]) for name in made)


def test_there_and_back(run, model, tuned, tmp_path):
    out = tmp_path / "adapter"
    status, said, err = run("adapt", "extract", tuned, "--base", model, "--rank", "8", "-o", out)
    assert (status, err) == (0, "")
    assert "rank 8; keeps 100.00% of the change of 1 weights" in said
    equal(out, ws.adapt.extract(tuned, model, 8))
    assert run("adapt", "apply", model, out, "-o", tmp_path / "merged")[0] == 0
    made, wanted = ws.open(tmp_path / "merged"), ws.open(tuned)
    for name in wanted:
        torch.testing.assert_close(made[name], wanted[name], rtol=1e-5, atol=1e-5)
    assert made.lineage.past["method"] == "adapt.apply"


def test_an_amount(run, model, tuned, tmp_path):
    ws.adapt.extract(tuned, model, 2).save(tmp_path / "adapter")
    assert run("adapt", "apply", model, tmp_path / "adapter", "--amount", "0.5", "-o", tmp_path / "half")[0] == 0
    equal(tmp_path / "half", ws.adapt.apply(model, tmp_path / "adapter", 0.5))


def test_combining(run, model, tuned, tmp_path):
    paths = [tmp_path / "one", tmp_path / "two"]
    for rank, path in enumerate(paths, 1):
        ws.adapt.extract(tuned, model, rank).save(path)
    arguments = ["--weight", "0.7,0.3", "--combination", "svd", "--rank", "2"]
    assert run("adapt", "combine", *paths, *arguments, "-o", tmp_path / "both")[0] == 0
    equal(tmp_path / "both", ws.adapt.combine(paths, [0.7, 0.3], "svd", rank=2))
    assert run("adapt", "combine", paths[0], "--weight", "2", "-o", tmp_path / "twice")[0] == 0
    equal(tmp_path / "twice", ws.adapt.combine(paths[:1], [2.0]))


def test_options_of_extract(run, model, tuned, tmp_path):
    arguments = ["--energy", "0.5", "--pattern", "h.*", "--rest", "skip", "--dtype", "bf16"]
    status, said, _ = run("adapt", "extract", tuned, "--base", model, *arguments, "-o", tmp_path / "a", "--json")
    assert status == 0
    assert json.loads(said)["tensors"] == 2
    equal(tmp_path / "a", ws.adapt.extract(tuned, model, energy=0.5, pattern="h.*", rest="skip", dtype="bf16"))


def test_errors_are_one_line(run, model, tuned, tmp_path):
    status, _, err = run("adapt", "apply", model, tuned, "-o", tmp_path / "out")
    assert status == 2
    assert "no adapter_config.json" in err
    assert run("adapt", "extract", tuned, "--base", model, "-o", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()
