"""Repairing whole checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune import mask_of, repair
from weightsmith.weights import Weights


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))


def data() -> list[Tensor]:
    return list(torch.randn(60, 2, 5, 5, generator=torch.Generator().manual_seed(1)).split(20))


NAMES = ["0.weight", "3.weight", "5.weight"]


@pytest.fixture(scope="module")
def stats() -> Weights:
    return ws.stats.gram(network(), data())


@pytest.mark.parametrize("method", ["admm", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.5, "1:2"])
def test_what_a_repair_chooses_is_what_its_kernel_gives(method: str, sparsity: Any, stats: Weights):
    model, public = network(), repair.METHODS[method]
    found = public(model, stats=stats, sparsity=sparsity)
    state = model.state_dict()
    assert list(found) == list(state)
    for name in found:
        expected = state[name]
        if name in NAMES:
            rows = public.kernel(state[name].flatten(1), stats[name], sparsity=sparsity)
            assert int((rows == 0).sum()) == rows.numel() // 2
            expected = rows.reshape(state[name].shape)
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("method", ["admm", "least_squares", "sparsegpt"])
def test_a_given_mask_stays_and_the_outputs_come_closer(method: str, stats: Weights):
    model = network()
    masks = ws.prune.wanda(model, 0.5, stats=stats, action="mask")
    found = repair.METHODS[method](model, masks, stats=stats)
    named = repair.METHODS[method](model, mask=masks, stats=stats)
    pruned = ws.prune.apply_mask(model, masks)
    for name in NAMES:
        assert torch.equal(found[name] != 0, masks[name])
        assert torch.equal(named[name], found[name])

        def error(weights: Weights, name: str = name) -> float:
            change = (weights[name] - model.state_dict()[name]).flatten(1)
            return float(((change @ stats[name]) * change).sum())

        assert error(found) < 0.995 * error(pruned)


def test_options_may_differ_by_tensor_and_shares_too(stats: Weights):
    model = network()
    shares = {"0.weight": 0.25, "3.weight": "3:4", "*": 0.75}
    found = repair.sparsegpt(model, stats=stats, sparsity=shares, shrink={"3.*": 1.0, "*": 0.0})
    assert [int((found[name] == 0).sum()) for name in NAMES] == [18, 72, 24]
    state = model.state_dict()
    kept = found["3.weight"] != 0
    assert torch.equal(found["3.weight"][kept], state["3.weight"][kept])
    assert not torch.equal(found["5.weight"][found["5.weight"] != 0], state["5.weight"][found["5.weight"] != 0])
    some = repair.admm(model, stats=stats, sparsity=0.5, pattern="5.*weight")
    assert torch.equal(some["3.weight"], state["3.weight"])
    assert int((some["5.weight"] == 0).sum()) == 16


def test_saved_and_opened_with_its_lineage(tmp_path: Path, stats: Weights):
    weights = ws.open(network()).cast("bfloat16")
    found = repair.admm(weights, stats=stats, sparsity=0.5)
    found.save(tmp_path / "out")
    opened = ws.open(tmp_path / "out")
    assert opened["3.weight"].dtype == torch.bfloat16
    assert torch.equal(opened["3.weight"], found["3.weight"])
    assert int((opened["3.weight"] == 0).sum()) == 144
    assert "prune.repair.admm" in str(opened.lineage)


def test_tied_tensors_are_repaired_once():
    weight, rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.randn(9, 4)
    weights = {"a": weight, "b": weight}
    gram = {"b": rows.T @ rows}
    found = repair.sparsegpt(weights, stats=gram, sparsity=0.5, pattern="*")
    assert torch.equal(found["a"], found["b"])
    assert found.ties == {"b": "a"}
    masked = repair.least_squares(weights, {"b": weight > 0}, stats=gram)
    assert torch.equal(masked["a"] != 0, weight > 0)
    with pytest.raises(Error, match="have two masks"):
        repair.least_squares(weights, {"a": weight > 0, "b": weight < 0}, stats=gram)


def test_called_with_tensors_it_is_the_kernel():
    weight = torch.tensor([[1.0, 1.0]])
    gram, mask = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[False, True]])
    assert torch.equal(repair.least_squares(weight, gram, mask), repair.least_squares.kernel(weight, gram, mask))
    assert repair.sparsegpt(weight, gram, sparsity="1:2", damp=0).tolist() == [[0, 1.5]]


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("admm", {}, "needs mask=.* or sparsity="),
        ("least_squares", {}, "does not choose by itself"),
        ("least_squares", {"sparsity": 0.5}, "does not choose by itself"),
        ("admm", {"sparsity": 0.5, "mask": "own"}, "does not go with sparsity="),
        ("admm", {"pattern": "3.*", "mask": "own"}, "does not go with pattern="),
        ("admm", {"sparsity": 0.5, "stats": None}, "needs stats="),
        ("admm", {"sparsity": 0.5, "stats": {"3.weight": torch.eye(36)}}, "stats say nothing of 0.weight"),
        ("admm", {"sparsity": 0.5, "stats": dict.fromkeys(NAMES, torch.eye(5))}, "does not fit its weight"),
        ("admm", {"sparsity": "2:5"}, "cannot be cut into groups of 5"),
        ("admm", {"sparsity": 2.0}, "between 0 and 1"),
        ("admm", {"sparsity": 0.5, "rho": 0.0}, "admm needs"),
        ("admm", {"sparsity": 0.5, "sharpness": 1}, "no option 'sharpness'"),
        ("sparsegpt", {"sparsity": 0.5, "damp": -1.0}, "damp must be"),
        ("sparsegpt", {"mask": {"3.bias": torch.ones(8).bool()}}, "repairs are of matrices"),
        (
            "admm",
            {"sparsity": 0.5, "stats": {n: torch.ones(k) for n, k in zip(NAMES, (18, 36, 8), strict=True)}},
            "of 0.weight stats hold only the diagonal",
        ),
        ("sparsegpt", {"mask": {}}, "at least 1 tensor"),
        ("sparsegpt", {"mask": {"3.wight": torch.ones(8, 36).bool()}}, "did you mean '3.weight'"),
        ("sparsegpt", {"mask": {"3.weight": torch.ones(36, 8).bool()}}, "its weight is"),
        ("sparsegpt", {"mask": {"3.weight": torch.ones(8, 36)}}, "a mask is boolean"),
    ],
)
def test_what_is_refused_before_anything_is_read(method: str, change: dict[str, Any], says: str, stats: Weights):
    model = network()
    if change.get("mask") == "own":
        change = change | {"mask": mask_of(model)}
    with pytest.raises(Error, match=says):
        repair.METHODS[method](model, **({"stats": stats} | change))


def test_a_bad_weight_is_named_when_it_is_read(stats: Weights):
    model = network()
    model.state_dict()["3.weight"][0, 0] = torch.nan
    with pytest.raises(Error, match=r"3\.weight.*NaN"):
        repair.admm(model, stats=stats, sparsity=0.5)["3.weight"]
