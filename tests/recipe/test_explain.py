"""What would be done to every tensor."""

from __future__ import annotations

from pathlib import Path

import torch

import weightsmith as ws
from weightsmith import recipe as recipes


def test_every_tensor_with_its_own_options_and_files(models: Path):
    density = {"layers.0.*": 0.25, "*": 0.75}
    merged = ws.merge.ties(["a", "b"], base="base", density=density).cast("bfloat16")
    lines = recipes.explain(merged)
    assert [line.tensor for line in lines] == list(merged)
    for line in lines:
        assert line.shape == merged.spec(line.tensor).shape
        assert line.dtype == "bfloat16"
        assert line.tied is None
        first, last = line.steps
        assert first.startswith("ties(")
        assert f"density={0.25 if line.tensor.startswith('layers.0') else 0.75}" in first
        assert last == "to bfloat16"
        assert len(line.files) == 3


def test_what_nothing_is_done_to(models: Path):
    [line, *_] = recipes.explain(ws.open("a"))
    assert line.steps == ()
    assert len(line.files) == 1
    assert recipes.explain(ws.open({"w": torch.ones(2)}))[0].files == ("memory",)


def test_the_order_of_steps_and_tied_names():
    shared = torch.ones(4, 4)
    weights = ws.open({"embed": shared, "head": shared})
    lines = recipes.explain(ws.prune.magnitude(ws.merge.mean([weights, weights]), 0.5, pattern="*"))
    assert [line.tied for line in lines] == [None, "embed"]
    names = [step.partition("(")[0] for step in lines[0].steps]
    assert names.index("mean") < names.index("magnitude")


def test_long_options_are_cut():
    weights = [ws.open({"w": torch.ones(2)})] * 40
    [line] = recipes.explain(ws.merge.mean(weights, weight=list(range(1, 41))))
    assert line.steps[0].endswith("...)")
    assert len(line.steps[0]) < 80
