"""Pruning by names: the same weights as the parts called one by one, and bad input found before any data."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith import calibration, prune, stats
from weightsmith.errors import Error
from weightsmith.language import carried, described, with_weights
from weightsmith.prune import allocation, one_shot
from weightsmith.prune.repair import heal_weights

SMALL: dict[str, Any] = {"samples": 3, "length": 24}
BLOCK = "model.layers.0."


@pytest.fixture(scope="module")
def data(shared_llama: Path) -> tuple[ws.Weights, nn.Module, list[Any]]:
    """The weights, their model, and the batches that names are given."""
    weights = ws.open(shared_llama)
    config, _ = described(carried(weights))
    model = with_weights(config, weights, torch.float32).eval()
    return weights, model, list(calibration.texts(weights, [shared_llama.parent / "near.txt"], seed=0, **SMALL))


def same(found: ws.Weights, expected: Any) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def zeros(weights: Any, name: str) -> int:
    return int((weights[name] == 0).sum())


@pytest.mark.parametrize("given", ["text", "path", "several", "batches"])
def test_whatever_is_calibrated_on(shared_llama: Path, data, given: str):
    weights, _, batches = data
    text = shared_llama.parent / "near.txt"
    calibrate: Any = {"text": str(text), "path": text, "several": [text], "batches": iter(batches)}[given]
    state = torch.get_rng_state()
    found = one_shot(shared_llama, 0.5, calibrate=calibrate, **SMALL)
    assert same(found, prune.sequential(weights, batches, 0.5, score="wanda"))
    assert torch.equal(torch.get_rng_state(), state)
    assert prune.sparsity_of(found) == 0.5


def test_options_reach_the_parts(data):
    weights, model, batches = data
    grams = stats.gram(model, batches, pattern=prune.prunable(weights))
    dense = one_shot(weights, 0.5, calibrate=batches, propagate="dense")
    expected = prune.wanda(weights, 0.5, stats=grams)
    assert sum(int(((dense[n] == 0) != (expected[n] == 0)).sum()) for n in expected) <= 2  # equal but for rounding
    assert not same(dense, one_shot(weights, 0.5, calibrate=batches))
    some = one_shot(weights, "2:4", calibrate=batches, score="magnitude", pattern="*mlp*")
    assert same(some, prune.magnitude(weights, "2:4", pattern="*mlp*"))
    rows = one_shot(weights, 0.25, calibrate=batches, score="magnitude", scope="row")
    assert same(rows, prune.magnitude(weights, 0.25, scope="row"))
    blocks = one_shot(weights, 0.5, calibrate=batches, score="magnitude", structure="4x4")
    assert same(blocks, prune.magnitude(weights, 0.5, structure="4x4"))
    repaired = one_shot(weights, 0.5, calibrate=batches, repair="least_squares")
    assert same(repaired, prune.sequential(weights, batches, 0.5, score="wanda", repair="least_squares"))
    chosen = one_shot(weights, 0.5, calibrate=batches, score=None, repair="sparsegpt")
    assert same(chosen, prune.sequential(weights, batches, 0.5, score=None, repair="sparsegpt"))


def test_the_seed_reaches_who_draws(data):
    weights, _, batches = data
    for seed in (0, 5):
        found = one_shot(weights, 0.5, calibrate=batches, score="random", seed=seed)
        assert same(found, prune.random(weights, 0.5, seed=seed))


def shares_of(
    name: str, score: str, weights: ws.Weights, model: nn.Module, batches: list[Any], pattern: str | None = None
) -> dict[str, float]:
    """An allocation with the statistics of the whole dense model, not block by block."""
    method = getattr(allocation, name)
    names = prune.prunable(weights) if pattern is None else weights.names(pattern)
    grams = stats.gram(model, batches, pattern=names)
    energies = {n: gram.diagonal() for n, gram in grams.items()}
    if name == "owl":
        return method(weights, 0.6, stats=energies)
    if name not in ("distortion", "lagrangian"):
        return method(weights, 0.6)
    told: Any = {"wanda": energies, "obs": grams}.get(score)
    if score == "snip":
        told = stats.gradients(model, batches, pattern=names)
    own = functools.partial(
        getattr(prune, score), scope="tensor", pattern="*", **({} if told is None else {"stats": told})
    )
    known = grams if score == "obs" else energies
    return method(allocation.gram_curves(weights, stats=known, method=own, pattern=names), 0.6)


USABLE = ("distortion", "erk", "global_magnitude", "lagrangian", "lamp", "owl", "uniform")


@pytest.mark.parametrize("name", USABLE)
def test_allocations_by_name(data, name: str):
    weights, model, batches = data
    expected = shares_of(name, "magnitude", weights, model, batches)
    found = one_shot(weights, 0.6, calibrate=batches, score="magnitude", allocate=name)
    for one, share in expected.items():
        assert abs(zeros(found, one) - share * weights.spec(one).numel) <= 0.75
    assert name == "uniform" or len({round(share, 3) for share in expected.values()}) > 1
    every = sum(weights.spec(n).numel for n in expected)
    assert abs(sum(zeros(found, n) for n in expected) - 0.6 * every) <= len(expected) / 2


@pytest.mark.parametrize("score", ["wanda", "obs", "snip"])
def test_curves_are_those_of_the_score(data, score: str):
    weights, model, batches = data
    mlp = "*layers.0.mlp*"
    expected = shares_of("lagrangian", score, weights, model, batches, mlp)
    options: dict[str, Any] = {"score": score, "allocate": "lagrangian", "scope": "tensor", "pattern": mlp}
    found = one_shot(weights, 0.6, calibrate=batches, **options)
    for one, share in expected.items():
        assert abs(zeros(found, one) - share * weights.spec(one).numel) <= 0.75
    by_magnitude = shares_of("lagrangian", "magnitude", weights, model, batches, mlp)
    assert by_magnitude != pytest.approx(expected, abs=0.02)


def test_an_allocation_of_some_tensors_and_what_a_repair_chooses(data):
    weights, _, batches = data
    found = one_shot(weights, 0.5, calibrate=batches, allocate="distortion", pattern="*mlp*", score="magnitude")
    own = [name for name in weights if "mlp" in name]
    assert sum(zeros(found, n) for n in own) == pytest.approx(0.5 * sum(weights.spec(n).numel for n in own), abs=5)
    assert all(torch.equal(found[name], weights[name]) for name in weights if name not in own)
    found = one_shot(weights, 0.5, calibrate=batches, score=None, repair="sparsegpt", allocate="erk")
    shares = allocation.erk(weights, 0.5)
    assert same(found, prune.sequential(weights, batches, shares, score=None, repair="sparsegpt"))


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tensor": (0.5, {}),
    "all together": (0.5, {"scope": "global"}),
    "rows": (0.25, {"scope": "row"}),
    "groups": ("2:4", {}),
    "some groups": ({"*mlp*": "2:4", "*": 0.3}, {}),
    "whole rows": (0.5, {"structure": "row"}),
}


@pytest.mark.parametrize(("score", "way"), [*(("snip", way) for way in WAYS), ("obd", "rows"), ("taylor", "tensor")])
def test_scores_that_ask_for_gradients(data, score: str, way: str):
    weights, model, batches = data
    sparsity, options = WAYS[way]
    names = prune.prunable(weights)
    told: Any = stats.gradients(model, batches, pattern=names)
    if score == "obd":
        told = stats.fisher(model, batches, labels="given", pattern=names)
    found = one_shot(weights, sparsity, calibrate=batches, score=score, **options)
    assert same(found, getattr(prune, score)(weights, sparsity, stats=told, **options))


@pytest.mark.parametrize("score", ["snip", "obd"])
def test_scores_that_ask_for_gradients_with_a_repair(data, score: str):
    weights, model, batches = data
    mask = one_shot(weights, 0.5, calibrate=batches, score=score, scope="global").map(lambda weight: weight != 0)
    found = one_shot(weights, 0.5, calibrate=batches, score=score, scope="global", repair="least_squares")
    grams = stats.gram(model, batches, pattern=prune.prunable(weights))
    for name in prune.prunable(weights):
        assert not found[name][~mask[name]].any()
    for part in ("q_proj", "k_proj"):  # whose inputs nothing has changed yet
        name = f"{BLOCK}self_attn.{part}.weight"
        kernel: Any = prune.repair.least_squares.kernel
        expected = kernel(weights[name], grams[name], mask[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)
        assert not torch.equal(found[name], weights[name] * mask[name])


def test_a_store_of_another_score_is_not_gone_on_with(data, tmp_path: Path):
    weights, _, batches = data
    store = str(tmp_path / "store")
    first = one_shot(weights, 0.5, calibrate=batches, score="snip", store=store)
    again = one_shot(weights, 0.5, calibrate=batches, score="snip", store=store, resume=True)
    assert same(again, first.to_dict())
    with pytest.raises(Error, match="store"):
        one_shot(weights, 0.5, calibrate=batches, score="obd", store=store, resume=True)


def test_healing(data):
    weights, model, batches = data
    pruned = one_shot(weights, 0.5, calibrate=batches, score="magnitude")
    found = one_shot(weights, 0.5, calibrate=batches, score="magnitude", heal=3, seed=4)
    assert same(found, heal_weights(pruned, model, batches, model=model, steps=3, seed=4).to_dict())
    names = prune.prunable(weights)
    assert all(not found[name][pruned[name] == 0].any() for name in names)
    assert any(not torch.equal(found[name], pruned[name]) for name in names)


def never() -> Iterator[Tensor]:
    """Data that nobody may read."""
    pytest.fail("data were read before the options were checked")
    yield torch.zeros(())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "wnda"}, "score is one of lamp, magnitude, .*did you mean 'wanda'"),
        ({"score": "controls"}, "score='controls': it is not a score of single weights"),
        ({"repair": "admmm"}, "repair is one of admm, least_squares, sparsegpt; .*did you mean 'admm'"),
        ({"repair": "heal"}, "repair='heal': it does not repair layer by layer"),
        ({"score": None}, "needs a score, or a repair that chooses"),
        ({"score": None, "repair": "least_squares"}, "least_squares does not choose what to remove"),
        ({"score": None, "repair": "sparsegpt", "scope": "row"}, "are of scores"),
        ({"allocate": "erkk"}, "allocate is one of distortion, .*did you mean 'erk'"),
        *[({"allocate": n}, f"allocate='{n}': it asks for more") for n in sorted({*allocation.METHODS} - {*USABLE})],
        ({"allocate": "erk", "sparsity": "2:4"}, "allocate='erk' shares one number among the tensors"),
        ({"allocate": "erk", "sparsity": {"*": 0.5}}, "allocate='erk' shares one number among the tensors"),
        ({"allocate": "erk", "score": "snip", "scope": "global"}, "so does scope=.global.; give one"),
        ({"scope": "global"}, 'scope="global" cannot be had'),
        ({"scope": "rows"}, "scope must be one of"),
        ({"sparsity": 1.5}, "must lie between 0 and 1"),
        ({"sparsity": "2:5"}, "cannot be cut into groups of 5"),
        ({"structure": "ring"}, "structure"),
        ({"pattern": "*nothing*"}, "no float tensor fits"),
        ({"propagate": "sparse"}, "propagate is 'changed' or 'dense'"),
        ({"heal": -1}, "heal is a number of steps"),
        ({"resume": True}, "resume=True continues what is in store="),
        ({"dtype": "float31"}, "float31"),
    ],
)
def test_errors_come_before_long_work(shared_llama: Path, options: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        one_shot(shared_llama, calibrate=never(), **options)


def test_data_that_are_not_there(shared_llama: Path):
    with pytest.raises(Error, match="a text file or batches; got none"):
        one_shot(shared_llama, 0.5, calibrate=[])
    with pytest.raises(ValueError, match="cannot be read as text"):
        one_shot(shared_llama, 0.5, calibrate="nowhere.txt")
