"""``weightsmith prune``: with and without a text, told and drawn; wrong calls found at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weightsmith as ws

MATRICES = "model.layers.{}.mlp.up_proj.weight"


def prune(run, llama: Path, method: str, *more: object):
    """The command on a text, into a folder beside the model."""
    return run("prune", method, llama, "-o", llama.parent / "out", "--json", "--samples", 4, "--length", 32, *more)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_half_goes_and_the_rest_loads(run, llama: Path, method: str):
    from transformers import LlamaForCausalLM

    folder = llama.parent
    status, out, err = prune(
        run, llama, method, "--sparsity", 0.5, "--calibrate", folder / "near.txt", "--evaluate", folder / "far.txt"
    )
    assert status == 0, err
    told = json.loads(out)
    assert told["pruned"]["zeros"] == pytest.approx(0.5, abs=0.02)
    assert [row["model"] for row in told["evaluated"]] == ["before", "after"]
    assert told["evaluated"][0]["KL"] == pytest.approx(0, abs=1e-5)
    assert told["evaluated"][1]["KL"] > 0
    net = LlamaForCausalLM.from_pretrained(folder / "out")
    pruned = net.state_dict()[MATRICES.format(0)]
    assert (pruned == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    before = ws.open(llama)
    assert torch.equal(before["model.embed_tokens.weight"], net.state_dict()["model.embed_tokens.weight"])


def test_on_a_text_is_what_the_parts_make_one_by_one(run, llama: Path):
    folder = llama.parent
    status, _, err = prune(
        run, llama, "wanda", "--sparsity", "2:4", "--calibrate", folder / "near.txt", "--propagate", "dense"
    )
    assert status == 0, err
    from weightsmith import calibration
    from weightsmith.language import built, carried

    weights = ws.open(llama)
    model, _ = built(weights, carried(weights), torch.float32)
    batches = calibration.texts(weights, [folder / "near.txt"], samples=4, length=32)
    expected = ws.prune.wanda(weights, "2:4", stats=ws.stats.gram(model, batches))
    found = ws.open(folder / "out")
    for name in ws.prune.prunable(weights):
        assert torch.equal(found[name], expected[name]), name
        assert int((found[name].reshape(-1, 4) != 0).sum(1).max()) == 2


def test_repair_lowers_the_change_of_outputs(run, llama: Path):
    folder = llama.parent
    losses = {}
    for repair in (None, "least_squares"):
        more = [] if repair is None else ["--repair", repair]
        status, out, err = prune(
            run, llama, "wanda", "--sparsity", 0.5, "--calibrate", folder / "near.txt", "--evaluate",
            folder / "near.txt", "--overwrite", *more,
        )  # fmt: skip
        assert status == 0, err
        losses[repair] = json.loads(out)["evaluated"][1]["KL"]
    assert losses["least_squares"] < losses[None]


def test_a_report_with_plots_and_packed_weights(run, llama: Path):
    folder = llama.parent
    page = folder / "report.html"
    status, out, err = run(
        "prune", "wanda", llama, "-o", folder / "out", "--calibrate", folder / "near.txt", "--samples", 4, "--length",
        32, "--report", page, "--pack", "sparse-bitmask", "--evaluate", folder / "near.txt",
    )  # fmt: skip
    assert status == 0, err
    assert "zeros" in out
    assert "report.html" in out
    assert "near.txt" in err  # it is what was calibrated on
    text = page.read_text()
    assert "<svg" in text
    assert "Zeros by layer and kind" in text
    packed = ws.open(folder / "out")
    assert any(name.endswith(".bitmask") for name in packed)
    dense = ws.prune.formats.unpack(packed)
    assert set(dense) == set(ws.open(llama))


def test_without_a_text(run, llama: Path):
    folder = llama.parent
    status, out, err = run("prune", "magnitude", llama, "-o", folder / "out", "--allocate", "erk", "--sparsity", 0.6)
    assert status == 0, err
    assert "zeros" in out
    weights, found = ws.open(llama), ws.open(folder / "out")
    shares = ws.prune.allocation.erk(weights, 0.6)
    expected = ws.prune.magnitude(weights, shares)
    assert all(torch.equal(found[name], expected[name]) for name in weights)


def test_healing_keeps_zeros_and_helps(run, llama: Path):
    folder = llama.parent
    found = {}
    for steps in (0, 20):
        status, out, err = prune(
            run, llama, "magnitude", "--sparsity", 0.7, "--calibrate", folder / "near.txt", "--evaluate",
            folder / "near.txt", "--heal", steps, "--overwrite",
        )  # fmt: skip
        assert status == 0, err
        found[steps] = json.loads(out)
    assert found[20]["pruned"]["zeros"] == pytest.approx(found[0]["pruned"]["zeros"], abs=1e-3)
    assert found[20]["evaluated"][1]["KL"] < found[0]["evaluated"][1]["KL"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wanda"], "wanda asks the data: add --calibrate TEXT"),
        (["magnitude", "--repair", "admm"], "--repair asks the data"),
        (["magnitude", "--heal", 5], "--heal asks the data"),
        (["sparsegpt", "--calibrate", "near.txt", "--repair", "admm"], "sparsegpt repairs by itself"),
        (["wanda", "--calibrate", "nowhere.txt"], "nowhere.txt: cannot be read as text"),
        (
            ["wanda", "--calibrate", "near.txt", "--length", 32, "--samples", 4, "--sparsity", "1.5"],
            "must lie between 0 and 1",
        ),
        (["wanda", "--calibrate", "near.txt", "--report", "page.pdf"], "a report is written as one of .html"),
        (["wnda"], "did you mean 'wanda'"),
    ],
)
def test_wrong_calls_are_found_before_any_work(run, llama: Path, monkeypatch, arguments: list[object], words: str):
    monkeypatch.chdir(llama.parent)
    method, *more = arguments
    status, _, err = run("prune", method, llama, "-o", "out", *more)
    assert status == 2
    assert words in err
    assert not Path("out").exists()


def test_a_random_score_has_one_seed(run, llama: Path):
    folder, found = llama.parent, {}
    for place, more in {"a": ["--calibrate", folder / "near.txt"], "b": []}.items():
        extra = ["--samples", 2, "--length", 16] if more else []
        status, _, err = run("prune", "random", llama, "-o", folder / place, "--seed", 3, *more, *extra)
        assert status == 0, err
        found[place] = ws.open(folder / place)
    assert all(torch.equal(found["a"][name], found["b"][name]) for name in found["a"])
