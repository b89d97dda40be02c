"""Effects of blocks, against gradients of examples one by one and a curvature that is really formed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune import _blocks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


INPUTS, LABELS = normal(11, 4, seed=1), torch.arange(11) % 4
BATCHES = [(INPUTS[:4], LABELS[:4]), (INPUTS[4:], LABELS[4:])]
BLOCKS = {"0.weight": "3x2", "2.weight": "2x3"}


def example_gradients(model: nn.Module, name: str) -> Tensor:
    """``[n, *shape]`` by a loop."""
    rows = []
    for x, y in zip(INPUTS, LABELS, strict=True):
        value = functional.cross_entropy(model(x[None]), y[None])
        rows.append(torch.autograd.grad(value, model.get_parameter(name))[0])
    return torch.stack(rows).double()


def blocks_of(shape: tuple[int, ...], structure: str) -> list[Tensor]:
    """The mask of each block, row by row of blocks."""
    height, width = map(int, structure.split("x"))
    found = []
    for top, left in itertools.product(range(0, shape[0], height), range(0, shape[1], width)):
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[top : top + height, left : left + width] = True
        found.append(mask)
    return found


def rise(gradients: Tensor, weight: Tensor, gone: Tensor, slope: bool) -> float:
    """[-g'w +] w'Hw / 2 over what is gone, with the matrix H."""
    each = gradients[:, gone]
    bend = each.T @ each / len(each)
    w = weight.double()[gone]
    return float(0.5 * w @ bend @ w - (each.mean(0) @ w if slope else 0.0))


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_scores_by_hand(at_once, slope):
    model = network()
    found = ws.prune.block_taylor(model, BATCHES, structure=BLOCKS, slope=slope, at_once=at_once)
    for name, structure in BLOCKS.items():
        weight, gradients = model.get_parameter(name).detach(), example_gradients(model, name)
        for mask in blocks_of(tuple(weight.shape), structure):
            values = found[name][mask]
            assert (values == values[0]).all()
            assert float(values.sum()) == pytest.approx(rise(gradients, weight, mask, slope), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("slope", [False, True])
def test_curves_by_hand(slope):
    model = network()
    grids = _blocks.grids_of(model, BLOCKS, None)
    effects = _blocks.block_effects(model, BATCHES, grids, 5, None)
    for name, structure in BLOCKS.items():
        weight, gradients = model.get_parameter(name).detach(), example_gradients(model, name)
        masks = blocks_of(tuple(weight.shape), structure)
        order = sorted(range(len(masks)), key=lambda b: rise(gradients, weight, masks[b], slope))
        expected = [0.0]
        for count in range(1, len(masks) + 1):
            gone = torch.stack([masks[b] for b in order[:count]]).any(0)
            expected.append(rise(gradients, weight, gone, slope))
        assert _blocks.curve(effects[name], slope).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_curve_is_that_of_the_blocks_that_go_also_among_equals():
    effects = torch.tensor([[1.0, 1.0, -1.0]])
    assert _blocks.curve(effects).tolist() == [0.0, 0.5, 0.0, 0.5]
    score = {"w": _blocks.second_order(effects, False)[None]}
    kept = ws.prune.by_score({"w": torch.ones(1, 3)}, score, 2 / 3, action="mask")["w"][0]
    assert float(_blocks.second_order(effects[:, ~kept].sum(1, keepdim=True), False)) == 0.0


def test_blocks_of_one_weight_are_the_second_order_of_single_weights():
    model = network()
    found = ws.prune.block_taylor(model, BATCHES, structure="1x1", slope=True)
    first = ws.stats.gradients(model, BATCHES)
    second = ws.stats.fisher(model, BATCHES, labels="given")
    for name in BLOCKS:
        weight = model.get_parameter(name).detach()
        expected = ws.prune.taylor.kernel(weight, first[name]) + ws.prune.obd.kernel(weight, second[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)


def test_a_small_block_costs_what_is_foretold():
    """Shrink one block a little: the loss changes by the first order of its score."""
    model = network().double()
    batches = [(x.double(), y) for x, y in BATCHES]
    grids = _blocks.grids_of(model, BLOCKS, None)
    effects = _blocks.block_effects(model, batches, grids, 16, None)["0.weight"]
    for mask, effect in zip(blocks_of((6, 4), "3x2"), effects.mean(0).tolist(), strict=True):
        after = []
        for step in (1e-4, -1e-4):
            other = copy.deepcopy(model)
            other[0].weight.data[mask] *= 1 - step
            after.append(float(functional.cross_entropy(other(INPUTS.double()), LABELS).detach()))
        assert (after[0] - after[1]) / 2e-4 == pytest.approx(-effect, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_lpvit_takes_the_cheapest_shares(sparsity, slope):
    """Of all pairs of shares that remove enough, with whole blocks of one size."""
    model = network()
    pruned = ws.prune.lpvit(model, BATCHES, sparsity, structure="2x2", slope=slope, floor=0.0)
    grids = _blocks.grids_of(model, "2x2", None)
    effects = _blocks.block_effects(model, BATCHES, grids, 16, None)
    curves = [_blocks.curve(effect, slope) for effect in effects.values()]
    counts = [int((pruned[name] == 0).sum()) // 4 for name in grids]
    assert sum(counts) == 12 * sparsity
    cost = sum(float(c[k]) for c, k in zip(curves, counts, strict=True))
    whole = int(12 * sparsity)
    best = min(float(curves[0][k] + curves[1][whole - k]) for k in range(max(0, whole - 6), min(6, whole) + 1))
    # Along convex hulls: the optimum, or close to it where the optimum is off them.
    assert cost <= best + 0.15 * abs(best) + 1e-9


def test_power_moves_sparsity_to_blocks_that_draw_more():
    model = network()
    shares = []
    for power in (0.0, 100.0):
        mask = ws.prune.lpvit(
            model, BATCHES, 0.5, structure="2x2", floor=0.0, power=power, block_power={"2.weight": 10.0}, action="mask"
        )
        shares.append(float((~mask["2.weight"]).double().mean()))
        assert sum(int((~mask[name]).sum()) for name in mask) == 24
    assert shares[1] == 1.0
    assert shares[0] < 1.0


def test_every_tensor_keeps_its_floor_and_the_model_stays():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    mask = ws.prune.lpvit(model, BATCHES, 0.6, structure="1x1", floor=0.3, power=100.0, action="mask")
    assert min(float(mask[name].double().mean()) for name in mask) >= 0.3
    assert sum(int((~mask[name]).sum()) for name in mask) == pytest.approx(0.6 * 48, abs=1)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_many_blocks_offer_some_sparsities_only(monkeypatch):
    monkeypatch.setattr(_blocks, "LEVELS", 5)
    mask = ws.prune.lpvit(network(), BATCHES, 0.5, structure="1x1", action="mask")
    gone = sum(int((~mask[name]).sum()) for name in mask)
    assert 24 <= gone <= 24 + 5


def test_convolutions_rows_columns_and_text_of_refusals():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    data = [(normal(5, 1, 4, 4), torch.arange(5) % 3)]
    for structure in ("row", "column", {"0.weight": "2x3", "*": "1x4"}):
        found = ws.prune.block_taylor(conv, data, structure=structure)
        assert found["0.weight"].shape == (4, 1, 3, 3)
        assert ws.prune.by_score(conv, found, 0.5, structure=structure)["3.weight"].shape == (3, 16)
    for options, words in (
        ({"structure": "5x5"}, "cannot be cut into blocks"),
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"structure": "2x2", "floor": 0.9}, "with a floor of 0.9"),
        ({"structure": "2x2", "power": -1.0}, "power is 0 or more"),
        ({"structure": "2x2", "at_once": 0}, "at_once is at least 1"),
        ({"structure": "2x2", "block_power": {"x": 1.0}}, "block_power names 'x'"),
    ):
        with pytest.raises(Error, match=words):
            ws.prune.lpvit(network(), BATCHES, **options)
    with pytest.raises(Error, match="at least one batch"):
        ws.prune.block_taylor(network(), [], structure="2x2")
    with pytest.raises(Error, match="not finite"):
        ws.prune.block_taylor(network(), [(INPUTS * float("inf"), LABELS)], structure="2x2")
