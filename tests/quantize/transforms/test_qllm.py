"""Channels taken apart exactly, and put together where it costs least."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.graph import trace
from weightsmith.quantize import coded
from weightsmith.quantize.grids import Integer
from weightsmith.quantize.transforms import assembled, disassembled, places, qllm, rechannelled


def outliers(rows: int = 200, channels: int = 40):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, channels, generator=generator)
    inputs[:, 7] *= 50
    return inputs, torch.randn(12, channels, generator=generator)


def test_taken_apart_is_exact_and_no_channel_is_above_the_threshold() -> None:
    inputs, weight = outliers()
    maxima = inputs.abs().amax(0)
    found = disassembled(maxima, 4.0)
    written, read = found.write(inputs.double()), found.read(weight.double())
    assert torch.allclose(written @ read.T, inputs.double() @ weight.double().T)
    assert written.abs().max() <= 4.0 + 1e-9
    counts = torch.bincount(found.index)
    assert counts.tolist() == [max(1, -(-value // 4.0)) for value in maxima.tolist()]
    assert torch.equal(disassembled(maxima, 1e9).index, torch.arange(40))


def test_put_together_are_the_pairs_that_cost_least() -> None:
    inputs, weight = outliers(50, 8)
    weight[:, 6] = weight[:, 1] + 0.01  # an even and an odd place, read alike
    inputs, weight = inputs.double(), weight.double()
    whole = disassembled(inputs.abs().amax(0), 1e9)
    found = assembled(whole, inputs.T @ inputs, weight, 7)
    off = (found.write(inputs) @ found.read(weight).T - inputs @ weight.T).square().sum()
    costs = {}
    for even, odd in itertools.product(range(0, 8, 2), range(1, 8, 2)):
        mean, both = (inputs[:, even] + inputs[:, odd]) / 2, weight[:, even] + weight[:, odd]
        apart = torch.outer(inputs[:, even], weight[:, even]) + torch.outer(inputs[:, odd], weight[:, odd])
        costs[even, odd] = float((torch.outer(mean, both) - apart).square().sum())
    assert float(off) == pytest.approx(min(costs.values()), rel=1e-6)
    assert min(costs, key=lambda pair: costs[pair]) == (6, 1)
    assert found.count == 7
    assert found.write(inputs).shape == (50, 7)


def test_two_pairs_cost_what_they_cost_apart() -> None:
    inputs, weight = (x.double() for x in outliers(50, 8))
    found = assembled(disassembled(inputs.abs().amax(0), 1e9), inputs.T @ inputs, weight, 6)
    old = [found.index[found.place == place].tolist() for place in range(found.count)]
    assert sorted(itertools.chain(*old)) == list(range(8))
    assert sorted(map(len, old)) == [1, 1, 1, 1, 2, 2]
    mean = torch.stack([inputs[:, one].mean(1) for one in old], 1)
    both = torch.stack([weight[:, one].sum(1) for one in old], 1)
    assert torch.allclose(found.write(inputs), mean)
    assert torch.allclose(found.read(weight), both)


def test_parts_of_one_channel_are_not_put_together_again() -> None:
    inputs, weight = outliers()
    split = disassembled(inputs.abs().amax(0), 20.0)
    found = assembled(split, inputs.T @ inputs, weight, 40)
    mixed = [found.index[found.place == place].tolist() for place in range(found.count)]
    assert found.count == 40
    assert all(len(set(one)) == len(one) for one in mixed)
    assert torch.bincount(found.index)[7] == torch.bincount(split.index)[7]
    with pytest.raises(Error, match="higher threshold"):
        assembled(split, inputs.T @ inputs, weight, 3)


def test_products_of_rounded_inputs_and_weights_come_nearer() -> None:
    inputs, weight = outliers(400, 160)
    found = qllm(inputs, weight, bits=4)
    grid = Integer(bits=4, symmetric=False)

    def off(given, read) -> float:
        return float((coded(given, grid).values() @ coded(read, grid).values().T - inputs @ weight.T).square().sum())

    before, after = off(inputs, weight), off(found.write(inputs), found.read(weight))
    assert found.count == 160
    assert after < before / 2
    held = torch.randn(200, 160) * inputs.square().mean(0).sqrt()
    new = coded(found.write(held), grid).values() @ coded(found.read(weight), grid).values().T
    old = coded(held, grid).values() @ coded(weight, grid).values().T
    assert (new - held @ weight.T).square().sum() < (old - held @ weight.T).square().sum() / 2


def test_even_channels_stay_as_they_are() -> None:
    inputs = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).sign()
    assert torch.equal(qllm(inputs, torch.eye(8)).index, torch.arange(8))


def test_in_a_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    inputs = torch.randn(30, 6).double()
    (place,) = places(net, trace(net, inputs, verify=False))
    hidden = net[1](net[0](inputs)).detach()
    wide = disassembled(hidden.abs().amax(0), float(hidden.abs().max()) / 3)
    new = rechannelled(net, place, wide)
    assert new.spec("0.weight").shape == (wide.count, 6)
    assert new["2.weight"].shape == (3, wide.count)
    assert wide.count > 8
    bigger = nn.Sequential(nn.Linear(6, wide.count), nn.ReLU(), nn.Linear(wide.count, 3)).double()
    new.load_into(bigger)
    assert torch.allclose(bigger(inputs), net(inputs))
    with pytest.raises(Error, match="has 8 units"):
        rechannelled(net, place, disassembled(torch.ones(5), 1.0))


def test_refusals() -> None:
    for call, said in (
        (lambda: disassembled(torch.ones(3), 0.0), "above 0"),
        (lambda: disassembled(torch.tensor([1.0, torch.nan]), 1.0), "finite"),
        (lambda: qllm(torch.ones(3, 4), torch.ones(2, 5)), "do not fit"),
        (lambda: qllm(torch.full((3, 4), torch.nan), torch.ones(2, 4)), "finite"),
        (lambda: qllm(torch.ones(3, 4), torch.ones(2, 4), steps=0), "at least one"),
    ):
        with pytest.raises(Error, match=said):
            call()
