"""Synaptic flow and its conservation; GraSP against an explicit Hessian."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune import _flow
from weightsmith.prune._autograd import free_parameters


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(bias: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            nn.Linear(5, 7, bias=bias),
            nn.ReLU(),
            nn.Linear(7, 6, bias=bias),
            nn.ReLU(),
            nn.Linear(6, 3, bias=bias),
        ]
        return nn.Sequential(*layers)


WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def unchanged(model: nn.Module, run) -> None:
    """A run leaves parameters, modes, gradients and the random state."""
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    run()
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


# Synaptic flow


def test_flow_is_conserved_from_layer_to_layer_and_through_units():
    """Without biases, what flows through a layer is all of it, and into a unit flows what flows out."""
    model = network()
    masks = {name: torch.rand_like(model.get_parameter(name)) < 0.8 for name in WEIGHTS}
    with free_parameters(model, WEIGHTS):
        first, second, third = _flow._Flow(model, torch.ones(1, 5))(masks)
    size = {name: (model.get_parameter(name).detach().abs() * masks[name]).double() for name in WEIGHTS}
    whole = float((size["4.weight"] @ size["2.weight"] @ size["0.weight"]).sum())
    assert [float(part.sum()) for part in (first, second, third)] == pytest.approx([whole] * 3)
    torch.testing.assert_close(first.sum(1), second.sum(0))
    torch.testing.assert_close(second.sum(1), third.sum(0))


def test_synflow_goes_round_by_round():
    model, rounds, sparsity = network(), 4, 0.7
    left = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in WEIGHTS}
    total = sum(mask.numel() for mask in left.values())
    went = {name: torch.zeros_like(model.get_parameter(name)) for name in WEIGHTS}  # rounds, from the last
    for turn in range(1, rounds + 1):
        a, b, c = ((model.get_parameter(name).detach().abs() * left[name]).double() for name in WEIGHTS)
        scores = [
            a * (c @ b).sum(0)[:, None],
            b * c.sum(0)[:, None] * a.sum(1)[None, :],
            c * (b @ a).sum(1)[None, :],
        ]
        keep = total - round(total * (1 - 0.3 ** (turn / rounds)) - 1e-9)
        least = torch.cat([score.flatten() for score in scores]).sort(descending=True).values[keep - 1]
        for name, score in zip(WEIGHTS, scores, strict=True):
            went[name][left[name] & (score < least)] = turn - rounds - 1
        left = {name: left[name] & (score >= least) for name, score in zip(WEIGHTS, scores, strict=True)}
    found = ws.prune.synflow(model, torch.ones(2, 5), sparsity, rounds=rounds)
    masks = ws.prune.by_score(model, found, sparsity, scope="global", action="mask")
    for name in WEIGHTS:
        assert torch.equal(masks[name], left[name])
        assert torch.equal(found[name].floor(), went[name])
    fewer = ws.prune.by_score(model, found, 0.4, scope="global", action="mask")
    assert all(bool((fewer[name] | ~masks[name]).all()) for name in WEIGHTS)


def test_no_layer_is_emptied_where_one_round_would_empty_it():
    model = network()
    many, once = (ws.prune.synflow(model, torch.ones(1, 5), 0.95, rounds=rounds) for rounds in (100, 1))
    left = [int((many[name] >= 0).sum()) for name in WEIGHTS]
    assert sum(left) == 5
    assert min(left) >= 1
    assert min(int((once[name] >= 0).sum()) for name in WEIGHTS) == 0


def test_synflow_with_biases_norms_and_ties():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16)
        )
    model[5].weight = model[4].weight
    model[1].running_mean.copy_(torch.tensor([-9.0, 9.0, -9.0, 9.0]))  # as absolute values
    found = ws.prune.synflow(model, torch.ones(1, 1, 4, 4), 0.5, rounds=3)
    assert list(found) == ["0.weight", "4.weight"]
    assert sum(int((found[name] >= 0).sum()) for name in found) == (36 + 256) // 2
    model[1].running_mean.fill_(9.0)
    again = ws.prune.synflow(model, torch.ones(1, 1, 4, 4), 0.5, rounds=3)
    assert all(torch.equal(found[name], again[name]) for name in found)
    unchanged(model, lambda: ws.prune.synflow(model, torch.ones(1, 1, 4, 4), 0.5, rounds=2))


def test_where_slopes_have_both_signs_their_size_counts_and_what_went_stays_away():
    """Behind a norm over a layer, one more path may make the sum smaller, by far more than 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5, bias=False))
    model[0].weight.data *= 1e-3  # what the norm makes large again
    model[1].weight.data *= 1e4
    model[1].bias.data.fill_(1.0)
    model[2].weight.data *= torch.linspace(1, 100, 6)
    names = ["0.weight", "2.weight"]
    masks = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names}
    left, flow = torch.ones(54, dtype=torch.bool), _flow._Flow(model, torch.ones(1, 4))
    for turn in range(1, 4):
        score = torch.cat([part.flatten() for part in flow(masks)])
        assert (score >= 0).all()
        keep = 54 - round(54 * (1 - 0.4 ** (turn / 3)) + 1e-9)
        left &= torch.zeros(54, dtype=torch.bool).index_fill(0, score.masked_fill(~left, -1).topk(keep).indices, True)
        masks = {"0.weight": left[:24].view(6, 4), "2.weight": left[24:].view(5, 6)}
    found = ws.prune.synflow(model, torch.ones(1, 4), 0.6, rounds=3)
    assert all(torch.equal(found[name] >= 0, masks[name]) for name in names)
    double = {n: v.detach().abs().double().requires_grad_() for n, v in model.named_parameters()}
    functional_call(model.double(), double, (torch.ones(1, 4, dtype=torch.float64),)).sum().backward()
    product = double["0.weight"].grad * double["0.weight"].detach()
    assert (product < -1).any()
    torch.testing.assert_close(flow({n: torch.ones_like(m) for n, m in masks.items()})[0], product.abs())


def test_a_network_through_which_nothing_flows():
    model = network()
    model[2].weight.data.zero_()
    found = ws.prune.synflow(model, torch.ones(1, 5), 0.5, rounds=2)
    assert all(found[name].isfinite().all() for name in found)
    assert sum(int((found[name] >= 0).sum()) for name in found) == 95 - round(95 * 0.5)


def test_refusals_of_synflow():
    model = network()
    with pytest.raises(Error, match="inputs of floats"):
        ws.prune.synflow(model, torch.ones(1, 5, dtype=torch.long), 0.5)
    with pytest.raises(Error, match="below 1"):
        ws.prune.synflow(model, torch.ones(1, 5), 1.0)
    with pytest.raises(Error, match="at least 1 round"):
        ws.prune.synflow(model, torch.ones(1, 5), 0.5, rounds=0)
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(Error, match="not finite"):
        ws.prune.synflow(model, torch.ones(1, 5), 0.5)
    with pytest.raises(Error, match="no float tensor fits"):
        ws.prune.synflow(model, torch.ones(1, 5), 0.5, pattern="head")


# GraSP


def explicit(model: nn.Module, data: tuple[Tensor, Tensor], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """All scored weights flat, their gradient and Hessian of the mean loss, in float64."""
    model = copy.deepcopy(model).double()
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in WEIGHTS])
    sizes = [model.get_parameter(name).numel() for name in WEIGHTS]

    def loss(values: Tensor) -> Tensor:
        named = {n: v.view_as(model.get_parameter(n)) for n, v in zip(WEIGHTS, values.split(sizes), strict=True)}
        return functional.cross_entropy(functional_call(model, named, (data[0].double(),)) / temperature, data[1])

    return flat, torch.func.grad(loss)(flat), torch.func.hessian(loss)(flat)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_the_weight_times_the_hessian_times_the_gradient(temperature):
    model, data = network(bias=True), (normal(12, 5, seed=3), torch.arange(12) % 3)
    flat, slope, bend = explicit(model, data, temperature)
    parts = [(data[0][:5], data[1][:5]), (data[0][5:], data[1][5:])]  # unequal batches are weighted by examples
    found = ws.prune.grasp(model, parts, temperature=temperature)
    scores = torch.cat([found[name].flatten() for name in WEIGHTS]).double()
    expected = (flat * (bend @ slope)).detach()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_high_score_says_that_the_gradient_would_shrink():
    model, data = network(), (normal(12, 5, seed=3), torch.arange(12) % 3)
    _, slope, _ = explicit(model, data, 1.0)
    found = ws.prune.grasp(model, [data], temperature=1.0)
    scores = torch.cat([found[name].flatten() for name in WEIGHTS])
    for place in (int(scores.argmax()), int(scores.argmin())):
        changed = copy.deepcopy(model)
        rest = place
        for name in WEIGHTS:
            values = changed.get_parameter(name).data.view(-1)
            if 0 <= rest < len(values):
                values[rest] *= 1 - 1e-3
            rest -= len(values)
        after = explicit(changed, data, 1.0)[1].square().sum()
        fall = float(slope.square().sum() - after) / 2e-3
        assert fall == pytest.approx(float(scores[place]), rel=0.02)


def test_grasp_leaves_the_model_and_takes_half_precision():
    model, data = network(bias=True), (normal(6, 5), torch.arange(6) % 3)
    unchanged(model, lambda: ws.prune.grasp(model, [data]))
    found = ws.prune.grasp(network().bfloat16(), [(data[0].bfloat16(), data[1])], temperature=1.0)
    assert all(found[name].dtype == torch.float32 and found[name].isfinite().all() for name in WEIGHTS)


def test_refusals_of_grasp():
    with pytest.raises(Error, match="at least one batch"):
        ws.prune.grasp(network(), [])
    with pytest.raises(Error, match="temperature above 0"):
        ws.prune.grasp(network(), [(normal(2, 5), torch.zeros(2).long())], temperature=0.0)
    with pytest.raises(Error, match="not finite"):
        ws.prune.grasp(network(), [(normal(2, 5) * float("nan"), torch.zeros(2).long())])
