"""As many multiplications, more units: `iso_flop`."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import weightsmith as ws
from weightsmith.prune.sparse import control, iso_flop
from weightsmith.prune.sparse._iso_flop import Branches, Kind

KINDS = get_args(Kind)


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))


def multiplications(module: nn.Module, kept: dict[str, int]) -> int:
    """Counted by PyTorch, each matrix product times the share of its weights that are there."""
    total = 0.0
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            with FlopCounterMode(display=False) as counter:
                part(torch.zeros(1, part.in_features))
            size = part.weight.numel()
            total += counter.get_total_flops() / 2 * kept.get(f"{name}.weight", size) / size
    return round(total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_multiplications_that_are_not_of_zero_are_as_many(kind: Kind, sparsity: float):
    small = net()
    example = torch.zeros(1, 20)
    made = iso_flop(small, sparsity, kind, example=example)
    optimizer = torch.optim.SGD(made.module.parameters(), lr=0.01)
    masks = control(made.module, optimizer, ws.prune.sparse.rigl(every=1, stop=4), densities=made.densities)
    for step in range(4):
        optimizer.zero_grad()
        inputs = torch.randn(4, 20, generator=torch.Generator().manual_seed(step))
        made.module(inputs).square().sum().backward()
        optimizer.step()
    kept = dict(masks.info.kept)
    left = 240 if kind != "wide" else 0  # the last layer is not replaced
    counted, dense = multiplications(made.module, kept), multiplications(small, {})
    assert abs(counted - dense) <= len(made.densities)
    assert made.before == dense - left
    assert abs(made.after - made.before) <= len(made.densities)
    assert made.module(torch.zeros(3, 20)).shape == (3, 10)
    for name, count in kept.items():
        assert abs(count - made.densities[name] * made.module.get_parameter(name).numel()) < 1
    assert sum(p.numel() for p in made.module.parameters()) > sum(p.numel() for p in small.parameters())


def test_wide_has_more_units_in_inner_spaces():
    made = iso_flop(net(), 0.75, example=torch.zeros(1, 20)).module
    shapes = [tuple(p.shape) for p in made.parameters() if p.dim() > 1]
    assert shapes == [(64, 20), (48, 64), (10, 48)]
    densities = iso_flop(net(), 0.75, example=torch.zeros(1, 20)).densities
    assert densities == {"0.weight": 0.5, "2.weight": 0.25, "4.weight": 0.5}


def test_wide_convolutions_with_batch_norm():
    small = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(),
                          nn.Linear(4 * 16, 3))  # fmt: skip
    made = iso_flop(small, 0.75, "wide", example=torch.zeros(1, 1, 8, 8))
    assert made.module(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert made.densities == {"0.weight": 0.5, "3.weight": 0.25, "5.weight": 0.5}
    assert made.after == made.before == 72 + 288 + 192


@pytest.mark.parametrize(("kind", "times"), [("wide", 1.5), ("doped", 1.6), ("parallel", 2.2), ("factorised", 3.5)])
def test_values_are_as_large_as_in_the_dense_module(kind: Kind, times: float):
    inputs = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    small = net()
    sizes = []
    for seed in range(5):
        made = iso_flop(small, 0.75, kind, example=inputs[:1], seed=seed)
        optimizer = torch.optim.SGD(made.module.parameters(), lr=0.01)
        control(made.module, optimizer, ws.prune.sparse.static(), densities=made.densities, seed=seed)
        fresh = ws.prune.structured.reinitialised(small, seed)
        sizes.append(math.log(float((made.module(inputs).std(0).mean() / fresh(inputs).std(0).mean()).detach())))
    assert abs(sum(sizes) / len(sizes)) < math.log(times)


def test_what_goes_in_is_left_and_seeds_count():
    small = net()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    state = torch.get_rng_state()
    one, same, other = (iso_flop(small, 0.75, "doped", seed=seed).module for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert torch.equal(one[0].layers[0].weight, same[0].layers[0].weight)
    assert not torch.equal(one[0].layers[0].weight, other[0].layers[0].weight)


def test_branches_by_hand():
    made = iso_flop(net(), 0.75, "parallel").module
    inputs = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = sum(layer(inputs).relu() for layer in made[0].layers)
    torch.testing.assert_close(made[0](inputs), expected)
    assert len(made[0].layers) == 4
    doped = iso_flop(net(), 0.75, "doped").module[0]
    assert isinstance(doped, Branches)
    wide, product = doped.layers
    torch.testing.assert_close(doped(inputs), wide(inputs) + product(inputs))
    assert product[0].out_features == math.floor(0.75 * 20 * 32 / 52)
    factors = iso_flop(net(), 0.75, "factorised", activation=nn.Tanh).module[0]
    torch.testing.assert_close(factors(inputs), factors[2](factors[0](inputs).tanh()))
    assert factors[0].out_features == math.ceil(20 * 32 / (0.25 * 52))


def test_a_layer_of_a_transformer_by_its_name():
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    made = iso_flop(block, 0.75, "doped", pattern=["linear1.weight", "linear2.weight"])
    assert list(made.densities) == ["linear1.layers.0.weight", "linear2.layers.0.weight"]
    assert made.module.train()(torch.zeros(1, 3, 16)).shape == (1, 3, 16)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"kind": "deep"}, "kind"),
        ({"sparsity": 0.0}, "sparsity"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"kind": "wide"}, "example="),
        ({"kind": "doped", "sparsity": 0.01}, "rank 0"),
        ({"kind": "parallel", "pattern": "nothing*"}, "nothing"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, object], words: str):
    with pytest.raises(ws.Error, match=words):
        iso_flop(net(), **({"sparsity": 0.75} | how))  # type: ignore[arg-type]
    with pytest.raises(ws.Error, match="inner"):
        iso_flop(nn.Sequential(nn.Linear(3, 3)), 0.5, "doped")
    with pytest.raises(ws.Error, match=r"no torch.nn.Linear"):
        iso_flop(nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(3, 3)), 0.5, "doped", pattern="*.weight")
