"""What the rescaling transforms share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.graph import trace
from weightsmith.quantize.room import planned
from weightsmith.quantize.transforms import places
from weightsmith.quantize.transforms._parts import divided, floored, graph_of, readings, sizes_of


def test_divided_in_every_form() -> None:
    inputs = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = torch.rand(8, dtype=torch.float64) + 0.5
    full = divided(inputs.T @ inputs, factors)
    assert torch.allclose(full, (inputs / factors).T @ (inputs / factors))
    assert torch.allclose(divided(inputs.square().sum(0), factors), full.diagonal())
    blocks = torch.stack([part.T @ part for part in inputs.split(4, 1)])
    assert torch.allclose(torch.block_diag(*divided(blocks, factors)), full * torch.block_diag(*torch.ones(2, 4, 4)))


def test_the_error_of_a_convolution_is_that_of_its_patches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2)).eval()
    images = torch.randn(3, 2, 7, 7)
    (place,) = places(net, trace(net, images, verify=False))
    plans = planned(ws.quantize.rtn.kernel, ws.open(net), {"bits": 3, "group": None})  # type: ignore[attr-defined]
    grams = ws.stats.gram(net, [images])
    (reading,) = readings(place, ws.open(net), plans, grams)
    factor = torch.tensor([0.5, 1.0, 3.0, 2.0])
    weight = net[2].weight.detach()  # type: ignore[index]
    inside = {"w": weight * factor[:, None, None]}
    rounded = ws.quantize.rtn(inside, bits=3, group=None, action="values", pattern="*")["w"] / factor[:, None, None]
    hidden = net[1](net[0](images)).detach()  # type: ignore[index,operator]
    off = nn.functional.conv2d(hidden, rounded - weight).square().sum()
    assert float(reading.error(factor)) == pytest.approx(float(off), rel=1e-3)
    sizes = sizes_of(place, ws.stats.activations(net, [images], what="mean_absolute"), "mean")
    wide = ws.stats.activations(net, [images], what="mean_absolute")["2.weight"].view(4, 4).mean(1)
    assert sizes is not None
    assert torch.allclose(sizes, wide)


def test_floored() -> None:
    assert floored(torch.tensor([10.0, 0.0, 5.0])).tolist() == pytest.approx([10.0, 1e-3, 5.0])
    assert floored(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert floored(torch.zeros(0)).tolist() == []


def test_a_graph_of_a_modules_first_batch_loses_no_batch() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    for batch in (torch.ones(4, 2), (torch.ones(4, 2), torch.ones(4)), [torch.ones(4, 2), torch.ones(4)]):
        graph, batches = graph_of(net, ws.open(net), None, iter([batch, "second"]))
        assert "0.weight" in graph.tensors
        assert batches is not None
        assert [str(one) for one in batches][1] == "second"
    with pytest.raises(Error, match="give batches=, or graph="):
        graph_of(net, ws.open(net), None, None)
    with pytest.raises(Error, match="at least one batch"):
        graph_of(net, ws.open(net), None, iter([]))
