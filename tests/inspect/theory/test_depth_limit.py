"""The three limits of depth, and the classifiers they are."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import deep_kernels, depth_limit, dual, hermite, kernel_classes, optimal_activation


def test_kinds():
    kinds = {"relu": "majority vote", "gelu": "majority vote", "tanh": "singular kernel", "linear": "linear kernel"}
    assert {name: depth_limit(name, depths=()).kind for name in kinds} == kinds
    assert depth_limit(lambda x: x**3 - 3 * x, depths=()).kind == "nearest neighbour"
    assert depth_limit("erf", depths=()).exponent == pytest.approx(
        -2 * math.log(2 / 3 / math.asin(2 / 3)) / math.log(2 / 3 / math.asin(2 / 3) / math.sqrt(1 - 4 / 9))
    )


def test_the_deep_kernel_has_the_exponent():
    coefficients = optimal_activation(3, degree=5)
    known = dual(lambda x: hermite(coefficients, x))
    assert known.slope_at_zero == pytest.approx(coefficients[1] ** 2)
    # Over a factor of B = slope at 1 in the squared distance, the kernel of the start falls by A = slope at 0 exactly.
    near = torch.tensor([1e-8, 1e-8 * known.slope_at_one], dtype=torch.float64)
    start, _ = deep_kernels(known, 1 - near, 60)
    power = -2 * float((start[1] / start[0]).log() / (near[1] / near[0]).log())
    assert power == pytest.approx(3, abs=1e-3)
    # That of training is the same in the limit, up to a share of 1 / depth.
    far = 1 - torch.tensor([0.5, 0.9, 1.2], dtype=torch.float64).square() / 2
    misses = []
    for depth in (50, 200):
        start, training = deep_kernels(known, far, depth)
        misses.append(float((training / start / (training / start)[-1] - 1).abs().max()))
    assert misses[1] == pytest.approx(misses[0] / 4, rel=0.3)
    found = depth_limit(lambda x: hermite(coefficients, x))
    assert found.exponent == pytest.approx(3)
    report = found.report()
    assert report["exponent"] == found.exponent
    assert len(found.rows()) == 75
    assert len(report.plots[0].lines) == 4


def test_hermite_is_orthonormal():
    from weightsmith.inspect.theory._parts import gaussian_nodes

    places, weights = gaussian_nodes()
    rows = torch.stack([hermite(tuple(float(i == j) for j in range(6)), places) for i in range(6)])
    torch.testing.assert_close((rows * weights) @ rows.T, torch.eye(6, dtype=torch.float64), atol=1e-10, rtol=0)


def test_kernel_classes_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    examples, inputs = torch.randn(30, 3, generator=generator), torch.randn(20, 3, generator=generator)
    labels = torch.randint(0, 3, (30,), generator=generator)
    found = kernel_classes(examples, labels, inputs, exponent=2.5)
    for place, said in zip(inputs, found.tolist(), strict=True):
        votes = [0.0] * 3
        for example, label in zip(examples, labels.tolist(), strict=True):
            votes[label] += float((place - example).double().norm()) ** -2.5
        assert votes.index(max(votes)) == said
    assert torch.equal(kernel_classes(examples, labels, examples, exponent=0.5), labels)
    nearest = labels[torch.cdist(inputs, examples).argmin(dim=1)]
    assert torch.equal(kernel_classes(examples, labels, inputs, exponent=2000.0), nearest)


def test_interpolating_networks_and_deep_votes():
    generator = torch.Generator().manual_seed(1)
    examples = torch.nn.functional.normalize(torch.randn(25, 4, generator=generator), dim=1)
    labels = torch.arange(25) % 3
    assert torch.equal(
        kernel_classes(examples, labels, examples, activation="relu", depth=2, kind="interpolate"), labels
    )
    inputs = torch.randn(15, 4, generator=generator)
    deep = kernel_classes(examples, labels, inputs, activation=lambda x: x**3 - 3 * x, depth=3)
    start = training = torch.nn.functional.normalize(inputs.double(), dim=1) @ examples.double().T
    for _ in range(3):  # the dual of that polynomial is the cube
        start, training = start**3, start**3 + training * 3 * start**2
    votes = torch.stack([training[:, labels == k].sum(dim=1) for k in range(3)], dim=1)
    assert torch.equal(deep, votes.argmax(dim=1))
    ordinary = kernel_classes(3 * examples, labels, inputs, activation="tanh", depth=2, kind="interpolate")
    here, across = (deep_kernels("tanh", one @ examples.double().T, 2)[1]
                    for one in (examples.double(), torch.nn.functional.normalize(inputs.double(), dim=1)))  # fmt: skip
    solved = across @ torch.linalg.solve(here, torch.nn.functional.one_hot(labels).double())
    assert torch.equal(ordinary, solved.argmax(dim=1))
    uneven = torch.cat([torch.zeros(20), torch.ones(5)]).long()
    assert not kernel_classes(examples, uneven, inputs, activation="gelu", depth=40).any()  # majority


def test_refusals():
    x, y = torch.ones(2, 2), torch.tensor([0, 1])
    with pytest.raises(Error, match="not both"):
        kernel_classes(x, y, x)
    with pytest.raises(Error, match="do not fit"):
        kernel_classes(x, y, torch.ones(2, 3), exponent=1.0)
    with pytest.raises(Error, match="labels"):
        kernel_classes(x, y[:1], x, exponent=1.0)
    with pytest.raises(Error, match="exponent="):
        kernel_classes(x, y, x, exponent=-1.0)
    with pytest.raises(Error, match="from 0, got -1"):
        kernel_classes(x, y - 1, x, exponent=1.0)
    with pytest.raises(Error, match="finite"):
        kernel_classes(x, y, x * torch.nan, exponent=1.0)
    with pytest.raises(Error, match="kind="):
        kernel_classes(x, y, x, activation="relu", kind="most")  # type: ignore[arg-type]
    with pytest.raises(Error, match="votes"):
        kernel_classes(x, y, x, exponent=1.0, kind="interpolate")
    with pytest.raises(Error, match="raise degree"):
        optimal_activation(0.1, degree=2)
    with pytest.raises(Error, match="above 0"):
        optimal_activation(-1)
    far = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(Error, match="fewer layers"):
        kernel_classes(far, y, torch.tensor([[1.0, 1.0]]), activation=lambda x: x**2 - 1, depth=30)
    assert kernel_classes(x, y, x[:0], exponent=1.0).tolist() == []


def test_kernel_classes_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(3)
    examples, inputs = torch.randn(40, 3, generator=generator), torch.randn(50, 3, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    one = [kernel_classes(examples, labels, inputs, **kernel) for kernel in ({"exponent": 2.0}, {"activation": "tanh"})]
    monkeypatch.setattr("weightsmith.inspect.theory._depth_limit._PAIRS", 90)
    monkeypatch.setattr("weightsmith.inspect.theory._dual._AT_ONCE", 7)
    other = [
        kernel_classes(examples, labels, inputs, **kernel) for kernel in ({"exponent": 2.0}, {"activation": "tanh"})
    ]
    assert all(map(torch.equal, one, other))
