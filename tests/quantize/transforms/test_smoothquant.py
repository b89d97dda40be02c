"""Factors from largest values, by hand; and the search of alpha by what the rounded network gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.quantize.transforms._networks import answers, network, state, traced
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.graph import declare, trace
from weightsmith.quantize.transforms import smoothquant, smoothquant_plus

OPTIONS: dict[str, Any] = {"bits": 3, "group": 8}


def outliers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        net[0].weight[3] *= 30
        net[0].weight[9] *= 10
    return net, [torch.randn(64, 8) for _ in range(2)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_formula(alpha: float) -> None:
    net, data = outliers()
    inputs = net[1](net[0](torch.cat(data))).detach()
    factor = inputs.abs().amax(0) ** alpha / net[2].weight.detach().abs().amax(0) ** (1 - alpha)
    new = smoothquant(net, data, alpha=alpha)
    assert torch.allclose(new["2.weight"], net[2].weight * factor, rtol=1e-5)
    assert torch.allclose(new["0.weight"], net[0].weight / factor[:, None], rtol=1e-5)
    assert torch.allclose(new["0.bias"], net[0].bias / factor, rtol=1e-5)


def test_the_largest_weight_of_all_readers_counts() -> None:
    weights = {"gain": torch.ones(2), "q": torch.tensor([[1.0, 4.0]]), "k": torch.tensor([[-16.0, 1.0]])}
    graph = declare(weights, {"gain": "s", "q": "1, < s", "k": "1, < s"}, spaces={"s": {"flags": ["rms_norm"]}})
    new = smoothquant(weights, graph=graph, gains={"gain": ["q", "k"]}, maxima={"q": torch.tensor([1.0, 9.0])})
    assert new["gain"].tolist() == pytest.approx([16**0.5, 4**0.5 / 3])
    assert new["q"].tolist() == [pytest.approx([0.25, 6.0])]


def test_grouped_heads_take_the_largest_of_those_that_share_them() -> None:
    model, _ = network("llama")
    name = "model.layers.0.self_attn.o_proj.weight"
    maxima = torch.arange(1.0, 25.0)
    new = smoothquant(model, graph=traced("llama"), maxima={name: maxima}, alpha=1.0)
    shared = torch.stack([maxima[:12].view(3, 4).amax(0), maxima[12:].view(3, 4).amax(0)])
    want = model.state_dict()[name.replace("o_proj", "v_proj")] / shared.flatten()[:, None]
    assert torch.allclose(new[name.replace("o_proj", "v_proj")], want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_function_stays(name: str) -> None:
    model, inputs = network(name)
    before, held = answers(model, inputs), state(model)
    if name == "gpt2":  # its own layers lie [in, out], and have no statistics
        with pytest.raises(Error):
            smoothquant(model, [inputs], graph=traced(name))
        return
    new = smoothquant(model, [inputs], graph=traced(name))
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())
    again = copy.deepcopy(model)
    new.load_into(again)
    assert torch.allclose(answers(again, inputs), before, atol=3e-5)


def test_dead_inputs_and_dead_weights_stay_finite() -> None:
    net, data = outliers()
    with torch.no_grad():
        net[0].weight[5], net[0].bias[5] = 0, -1
        net[2].weight[:, 7] = 0
    for alpha in (0.0, 1.0):
        assert all(value.isfinite().all() for value in smoothquant(net, data, alpha=alpha).to_dict().values())


def test_the_alpha_is_the_best_of_a_loop() -> None:
    net, data = outliers()

    @torch.no_grad()
    def off(weights) -> float:
        rounded = copy.deepcopy(net)
        ws.quantize.rtn(weights, action="values", **OPTIONS).load_into(rounded)
        return sum(float((rounded(x) - net(x)).double().square().sum()) for x in data)

    tried = [smoothquant(net, data, alpha=i / 4) for i in range(5)]
    errors = [off(net), *map(off, tried)]
    assert min(errors) < 0.9 * errors[0]
    new = smoothquant_plus(net, data, steps=4, **OPTIONS)
    best = [net.state_dict(), *tried][errors.index(min(errors))]
    assert all(torch.equal(new[name], best[name]) for name in new)


def test_where_nothing_helps_nothing_changes_and_a_loss_of_ones_own() -> None:
    net, data = outliers()
    same = smoothquant_plus(net, data, steps=2, loss=lambda model, batch: torch.zeros(()), **OPTIONS)
    assert all(torch.equal(same[name], value) for name, value in net.state_dict().items())
    seen = []
    smoothquant_plus(net, data, steps=2, loss=lambda model, batch: (seen.append(model.training), torch.zeros(()))[1])
    assert len(seen) == 4 * len(data)
    assert not any(seen)


def test_refusals() -> None:
    net, data = outliers()
    graph = trace(net, data[0], verify=False)
    for call, said in (
        (lambda: smoothquant(net), "batches of data"),
        (lambda: smoothquant(net, data, alpha=1.5), "from 0 to 1"),
        (lambda: smoothquant_plus(net, data, steps=0), "at least one alpha"),
        (lambda: smoothquant_plus(net.state_dict(), data), "give the module"),
        (lambda: smoothquant_plus(net, data, bitz=3), "bitz"),
        (lambda: smoothquant(nn.Sequential(nn.Linear(8, 2)), data), "no place"),
        (lambda: smoothquant(net, graph=graph, maxima={"2.weight": torch.full((16,), torch.nan)}), "not all finite"),
        (lambda: smoothquant_plus(net, data, loss=lambda *_: torch.tensor(torch.nan), steps=1), "finite number"),
    ):
        with pytest.raises(Error, match=said):
            call()
