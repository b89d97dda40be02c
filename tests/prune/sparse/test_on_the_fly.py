"""Filters on a sphere, the penalty that parts their weights, and what fills the cut, against loops by hand."""

import math

import pytest
import torch
from torch import nn

from weightsmith import Error, prune
from weightsmith.adapt import fold
from weightsmith.prune.sparse import bimodal, on_sphere, refilled
from weightsmith.prune.sparse._on_the_fly import filled


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 4))


def test_the_sphere_begins_where_the_module_was_and_the_gain_is_the_length():
    model = network()
    x, plain = torch.randn(2, 2, 3, 3), [model[0].weight.detach().clone(), model[3].weight.detach().clone()]
    before = model(x)
    found = on_sphere(model)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(found["0.weight"].gain.flatten(), plain[0].flatten(1).norm(dim=1))
    with torch.no_grad():
        found["3.weight"].gain.mul_(3)
        model[3].parametrizations.weight.original.mul_(7)
    torch.testing.assert_close(model[3].weight, 3 * plain[1])


def test_the_gradient_on_the_sphere_is_tangent_and_that_of_the_gain_is_radial():
    model = nn.Linear(5, 2, bias=False).double()
    sphere = on_sphere(model)["weight"]
    original = model.parametrizations.weight.original
    pull = torch.randn(2, 5, dtype=torch.float64)
    (model.weight * pull).sum().backward()
    torch.testing.assert_close((original.grad * original).sum(1), torch.zeros(2, dtype=torch.float64))
    unit = original / original.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sphere.gain.grad, (pull * unit).sum(1, keepdim=True))


def test_it_is_the_weight_normalisation_of_torch():
    ours, theirs = network(), network()
    on_sphere(ours)
    for i in (0, 3):
        nn.utils.parametrizations.weight_norm(theirs[i], dim=0)
    x = torch.randn(2, 2, 3, 3)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x))
    for i in (0, 3):
        torch.testing.assert_close(ours[i].weight, theirs[i].weight)


def test_a_filter_of_zeros_stays_and_gets_no_nan():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data[0] = 0
    sphere = on_sphere(model)["weight"]
    with torch.no_grad():
        sphere.gain.fill_(2.0)
    model.weight.sum().backward()
    assert model.weight[0].tolist() == [0.0, 0.0, 0.0]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_assigning_a_weight_gives_that_weight():
    model = nn.Linear(3, 2, bias=False)
    on_sphere(model)
    value = torch.randn(2, 3)
    model.weight = value
    torch.testing.assert_close(model.weight, value)
    fold(model)
    torch.testing.assert_close(model.weight, value)


def sines_by_hand(weights, sparsity):
    sines = []
    for weight in weights:
        for row in weight.flatten(1).tolist():
            order = sorted(range(len(row)), key=lambda j: abs(row[j]))
            left = list(row)
            for j in order[: round(sparsity * len(row))]:
                left[j] = 0.0
            dot = sum(a * b for a, b in zip(row, left, strict=True))
            cosine = dot / math.sqrt(sum(a * a for a in row) * max(sum(b * b for b in left), 1e-300))
            sines.append(math.sqrt(max(0.0, 1 - cosine**2)))
    return sum(sines) / len(sines)


@pytest.mark.parametrize("sparsity", [0.0, 0.28, 0.5, 0.9, 1.0])
def test_the_penalty_is_the_sine_of_the_angle_to_what_is_left(sparsity):
    torch.manual_seed(0)
    weights = [torch.randn(4, 10, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)]
    assert bimodal(weights, sparsity).item() == pytest.approx(sines_by_hand(weights, sparsity), abs=1e-9)
    assert bimodal([w * 1e3 for w in weights], sparsity).item() == pytest.approx(bimodal(weights, sparsity).item())


def test_going_down_the_penalty_parts_the_weights_and_keeps_the_length():
    torch.manual_seed(0)
    model = nn.Linear(20, 5, bias=False)
    on_sphere(model)
    lengths = model.weight.detach().norm(dim=1)
    optimizer = torch.optim.SGD([model.parametrizations.weight.original], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        bimodal([model.weight], 0.5).backward()
        optimizer.step()
    size = model.weight.detach().abs().sort(dim=1).values
    assert size[:, :10].max() < 0.05 * size[:, 10:].min()
    torch.testing.assert_close(model.weight.detach().norm(dim=1), lengths)


def test_the_penalty_has_finite_gradients_where_it_is_flat():
    w = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    value = bimodal([w], 0.5)
    value.backward()
    assert value.item() == pytest.approx(math.sqrt(0.5) / 3)
    assert w.grad.isfinite().all()
    assert w.grad[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert bimodal([torch.zeros(0, 3)], 0.5).item() == 0.0
    assert bimodal([torch.zeros(0, 3, device="meta")], 0.5).is_meta
    for weights, sparsity in (([], 0.5), ([torch.ones(3)], 0.5), ([torch.ones(3, 3)], 1.5)):
        with pytest.raises(Error, match="bimodal"):
            bimodal(weights, sparsity)


@pytest.mark.parametrize("shape", [(4, 12), (3, 2, 3, 2)])
def test_mean_filling_keeps_the_sum_of_each_filter_and_zero_filling_is_the_cut(shape):
    torch.manual_seed(0)
    weight, mask = torch.randn(shape, dtype=torch.float64), torch.rand(shape) < 0.4
    mask[0] = True
    mask[1] = False
    made = filled(weight, mask, "mean")
    for i in range(shape[0]):
        gone = [float(w) for w, m in zip(weight[i].flatten(), mask[i].flatten(), strict=True) if not m]
        expected = [
            float(w) if m else sum(gone) / len(gone)
            for w, m in zip(weight[i].flatten(), mask[i].flatten(), strict=True)
        ]
        assert made[i].flatten().tolist() == pytest.approx(expected, abs=1e-14)
    torch.testing.assert_close(made.flatten(1).sum(1), weight.flatten(1).sum(1), rtol=0, atol=1e-13)
    assert torch.equal(filled(weight, mask), weight * mask)


def test_means_of_bfloat16_are_those_of_float32_rounded():
    weight = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = weight.abs() > 0.5
    assert torch.equal(filled(weight, mask, "mean"), filled(weight.float(), mask, "mean").bfloat16())


def test_refilled_reaches_a_tied_weight_by_either_name():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    model[1].weight = model[0].weight
    mask = torch.eye(3)[:, :2] > 0
    for name in ("0.weight", "1.weight"):
        for fill in ("zero", "mean"):
            made = refilled(model, {name: mask}, fill=fill).to_dict()
            assert all(torch.equal(value, filled(model[0].weight, mask, fill)) for value in made.values())
    with pytest.raises(Error, match="two masks"):
        refilled(model, {"0.weight": mask, "1.weight": ~mask}, fill="mean")


def test_refilled_takes_masks_of_any_pruning_and_leaves_the_rest():
    model = network()
    masks = prune.magnitude(model, sparsity=0.5, scope="row", action="mask")
    mean, zero = refilled(model, masks, fill="mean").to_dict(), refilled(model, masks).to_dict()
    plain = {name: p.detach() for name, p in model.named_parameters()}
    for name in masks:
        assert torch.equal(mean[name], filled(plain[name], masks[name], "mean"))
        assert torch.equal(zero[name], plain[name] * masks[name])
    assert torch.equal(mean["0.bias"], plain["0.bias"])
    assert (
        refilled({"w": torch.ones(2, 2).bfloat16()}, {"w": torch.eye(2) > 0}, fill="mean")["w"].dtype == torch.bfloat16
    )
    with pytest.raises(Error, match="fill is one of"):
        refilled(model, masks, fill="median")
    with pytest.raises(Error, match="fits no tensor"):
        refilled(model, {"9.weight": torch.ones(2, 2) > 0})
    with pytest.raises(Error, match="one axis"):
        refilled(model, {"3.bias": torch.ones(4) > 0}, fill="mean")
    with pytest.raises(Error, match="boolean"):
        refilled(model, {"3.weight": torch.ones(4, 3)})
