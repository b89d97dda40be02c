"""Errors at several widths, against products written out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.quantize import gptq, rtn
from weightsmith.quantize.budget import curves, mixed


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 8, generator=generator), torch.arange(n) % 8) for n in (10, 6)]


def inputs_of(net: nn.Sequential, index: int) -> Tensor:
    with torch.no_grad():
        return net[:index](torch.cat([x for x, _ in batches()]))


def test_errors_of_outputs_are_shares_of_their_energy():
    net = network()
    found = curves(net, batches(), bits=(2, 4), group=4, symmetric=False, by="output")
    for index in range(3):
        weight, given = net[index][0].weight.detach(), inputs_of(net, index)
        for level in found[f"{index}.0.weight"]:
            coded = rtn(weight, given.T @ given, bits=level.bits, group=4, symmetric=False)
            share = (given @ (weight - coded.values()).T).square().sum() / (given @ weight.T).square().sum()
            assert level.error == pytest.approx(float(share), rel=1e-4)
            assert level.codes == 64 * level.bits
            assert level.size == 8 * 4 + 16 * 4 + 16  # words, steps, zero points


@pytest.mark.parametrize("method", [rtn, gptq])
def test_errors_of_the_loss_are_weighted_with_squared_gradients(method):
    net = network()
    found = curves(net, batches(), bits=(3,), method=method.__name__, by="loss")
    slopes = {index: [] for index in range(3)}
    twin = copy.deepcopy(net)
    for index in range(3):
        twin[index][0].register_forward_hook(
            lambda m, g, o, index=index: o.register_hook(slopes[index].append) and None
        )
    for x, y in batches():
        functional.cross_entropy(twin(x), y, reduction="sum").backward()
    for index in range(3):
        weight, given = net[index][0].weight.detach(), inputs_of(net, index)
        apart = weight - method(weight, given.T @ given, bits=3).values()
        felt = torch.cat(slopes[index]).square().mean(0)
        expected = ((given @ apart.T).square().sum(0) * felt).sum() / (2 * 16)
        assert found[f"{index}.0.weight"][0].error == pytest.approx(float(expected), rel=1e-3)


def test_the_model_is_left_as_it_was_and_more_bits_cost_less():
    net = network()
    before = copy.deepcopy(net.state_dict())
    found = curves(net, batches(), bits=(8, 2, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for levels in found.values():
        assert [level.bits for level in levels] == [2, 4, 8]
        assert levels[0].error > levels[1].error > levels[2].error
    assert set(mixed(found, 4.0)) == set(found)


def test_a_language_model_in_a_folder(llama: Path):
    from weightsmith import calibration

    texts = calibration.texts(llama, [llama.parent / "near.txt"], samples=2, length=16)
    for by in ("loss", "output"):
        found = curves(llama, texts, bits=(2, 4), by=by, group=8)  # type: ignore[arg-type]
        assert len(found) == 3 * 7
        assert all(levels[0].error > levels[1].error > 0 for levels in found.values())


def test_refusals():
    with pytest.raises(Error, match="by is 'loss' or 'output', got 'weights'"):
        curves(network(), batches(), by="weights")  # type: ignore[arg-type]
    with pytest.raises(Error, match="at least one width"):
        curves(network(), batches(), bits=())
    with pytest.raises(Error, match="bits must be a whole number from 1 to 8, got 9"):
        curves(network(), iter(()), bits=(9,))


def test_a_layer_that_half_of_the_rows_reach_costs_its_own_rows_alone():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, bias=False)), nn.Sequential(nn.Linear(8, 3))])
            self.layers[0].forward = self.half

        def half(self, x: Tensor) -> Tensor:
            return torch.cat([self.layers[0][0](x[: len(x) // 2]), x[len(x) // 2 :]])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    net, name = Halves(), "layers.0.0.weight"
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(40, 8, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    found = curves(net, [(inputs, labels)], bits=(3,), blocks="layers", pattern="layers.*")[name][0]
    weight, reached = net.layers[0][0].weight.detach(), inputs[:20]
    middle = (reached @ weight.T).requires_grad_()
    torch.nn.functional.cross_entropy(net.layers[1](middle), labels[:20], reduction="sum").backward()
    assert middle.grad is not None
    moved = reached @ (rtn(weight, bits=3).values() - weight).T
    expected = (middle.grad.square().mean(0) * moved.square().sum(0)).sum() / (2 * 40)
    assert found.error == pytest.approx(float(expected), rel=1e-3)
