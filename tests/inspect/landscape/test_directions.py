"""Directions: their scale, what stays, and the plane of a trajectory against a plain decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.landscape import between, principal, random_direction
from weightsmith.inspect.landscape._directions import inner, length
from weightsmith.weights import Weights


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def test_random_direction_has_the_norms_of_the_filters():
    net = convolutional()
    found = random_direction(net, seed=3)
    assert list(found) == [name for name, _ in net.named_parameters()]
    generator = torch.Generator().manual_seed(3)
    for name, parameter in net.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            assert not found[name].any()
            continue
        for row, wanted, plain in zip(found[name], parameter, drawn, strict=True):
            torch.testing.assert_close(row, (plain * wanted.norm() / plain.norm()).detach())


def test_random_direction_by_layer_by_weight_and_plain():
    net = convolutional()
    plain = random_direction(net, scale="none")
    assert plain["1.bias"].any()
    layer = random_direction(net, scale="layer")
    weight = random_direction(net, scale="weight", vectors="scaled")
    for name, parameter in net.named_parameters():
        p, d = parameter.detach(), plain[name]
        torch.testing.assert_close(weight[name], d * p.abs())
        expected = d * p.norm() / d.norm() if p.dim() > 1 else torch.zeros_like(p)
        torch.testing.assert_close(layer[name], expected)
    scaled = random_direction(net, vectors="scaled")
    torch.testing.assert_close(scaled["1.weight"].norm(), net[1].weight.detach().norm())
    assert not scaled["1.bias"].any()  # a bias of zeros has no length


def test_random_direction_of_some_names_is_that_of_all_there():
    net = convolutional()
    some, every = random_direction(net, pattern="3.*"), random_direction(net)
    assert torch.equal(some["3.weight"], every["3.weight"])
    assert not some["0.weight"].any()
    assert not torch.equal(random_direction(net, seed=1)["0.weight"], every["0.weight"])


def test_random_direction_knows_ties_low_precision_and_zeros():
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    net["b"].weight = net["a"].weight
    found = random_direction(net)
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
    half = random_direction({"w": torch.ones(2, 2, dtype=torch.bfloat16), "count": torch.tensor(3)})
    assert half["w"].dtype == torch.float32
    assert "count" not in half
    assert not random_direction({"w": torch.zeros(2, 2)})["w"].any()
    assert random_direction({"w": torch.ones(2, 2, dtype=torch.float64)})["w"].dtype == torch.float64


def test_random_direction_refuses():
    with pytest.raises(Error, match="scale is one of"):
        random_direction(convolutional(), scale="row")  # type: ignore[arg-type]
    with pytest.raises(Error, match="vectors is one of"):
        random_direction(convolutional(), vectors="keep")  # type: ignore[arg-type]
    with pytest.raises(Error, match="no floating tensor"):
        random_direction(convolutional(), pattern="nothing")


def test_between_is_the_difference_in_full_precision():
    a = {"w": torch.tensor([1.0, 256.0], dtype=torch.bfloat16), "n": torch.tensor(2)}
    b = {"w": torch.tensor([1.0078125, 258.0], dtype=torch.bfloat16), "n": torch.tensor(5)}
    found = between(a, b)
    assert list(found) == ["w"]
    assert found["w"].tolist() == [0.0078125, 2.0]
    assert found["w"].dtype == torch.float32
    with pytest.raises(Error, match="same tensors"):
        between({"w": torch.ones(1)}, {"v": torch.ones(1)})


def test_inner_counts_tied_tensors_once():
    shared = torch.tensor([3.0, 4.0])
    tied = Weights.of({"a": shared, "b": shared, "c": torch.ones(1)})
    assert inner(tied, tied) == 26
    assert length(tied) == pytest.approx(26**0.5)


def test_principal_against_a_plain_decomposition():
    generator = torch.Generator().manual_seed(0)
    run = [
        {"a": torch.randn(4, 3, generator=generator).double(), "b": torch.randn(5, generator=generator).double()}
        for _ in range(7)
    ]
    found = principal(run, count=3)
    flat = torch.stack([torch.cat([one["a"].reshape(-1), one["b"]]) for one in run])
    centred = flat - flat.mean(dim=0)
    _, sizes, right = torch.linalg.svd(centred, full_matrices=False)
    axes = torch.stack([torch.cat([d["a"].reshape(-1), d["b"]]) for d in found.directions])
    torch.testing.assert_close((axes @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.explained == pytest.approx((sizes.square() / sizes.square().sum())[:3].tolist())
    torch.testing.assert_close(
        torch.tensor(found.coordinates, dtype=torch.float64), (flat - flat[-1]) @ axes.T, rtol=0, atol=1e-10
    )
    assert found.coordinates[-1] == pytest.approx((0, 0, 0), abs=1e-12)
    assert found.report()["explained by direction 1"] == found.explained[0]
    assert len(found.report().plots[0].lines[0].x) == 7


def test_principal_refuses():
    point = {"w": torch.tensor([1.0, 2.0])}
    with pytest.raises(Error, match="at least 3 checkpoints"):
        principal([point, point])
    with pytest.raises(Error, match="fewer than 1"):
        principal([point, point], count=1)
    with pytest.raises(Error, match="fewer than 2"):
        principal([{"w": torch.tensor([float(i), 2.0 * i])} for i in range(4)])
    with pytest.raises(Error, match="same tensors"):
        principal([point, point, {"v": torch.ones(2)}])
    with pytest.raises(Error, match="no tensor fits"):
        principal([point] * 3, pattern="x")


def test_tensors_without_values_and_checkpoints_that_are_not_finite():
    found = random_direction({"none": torch.zeros(0, 5), "thin": torch.zeros(3, 0), "w": torch.ones(2, 2)})
    assert found["none"].shape == (0, 5)
    assert found["thin"].shape == (3, 0)
    points = [torch.tensor([1.0, float("nan")]), torch.zeros(2), torch.ones(2)]
    with pytest.raises(Error, match="finite checkpoints"):
        principal([{"w": point} for point in points])
