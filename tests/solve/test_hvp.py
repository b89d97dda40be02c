"""Products with curvature, against dense matrices of second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.solve import gauss_newton_product, hessian_product


def network() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 3, (7,))


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def every_unit(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    size = sum(p.numel() for p in parameters)
    rows = torch.eye(size, dtype=parameters[0].dtype).split([p.numel() for p in parameters], dim=1)
    return [row.reshape(size, *p.shape) for row, p in zip(rows, parameters, strict=True)]


def dense(function, parameters: list[torch.Tensor]) -> torch.Tensor:
    """The derivative of a vector-valued function of one flat vector, by torch's own means."""
    start = torch.cat([p.detach().reshape(-1) for p in parameters])
    shapes = [p.shape for p in parameters]

    def of(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([s.numel() for s in shapes])
        return function([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

    return torch.func.jacfwd(of)(start) if of(start).dim() else torch.func.hessian(of)(start)


def test_hessian_product_is_the_dense_hessian():
    net, x, y = network()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def loss(values: list[torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(torch.func.functional_call(net, dict(zip(names, values, strict=True)), x), y)

    expected = dense(loss, list(parameters))
    product = hessian_product(functional.cross_entropy(net(x), y), parameters)
    found = flat(product(every_unit(list(parameters))))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    one = flat(product([unit[2:3] for unit in every_unit(list(parameters))]))
    torch.testing.assert_close(one[0], expected[2], rtol=0, atol=1e-12)


def test_gauss_newton_product_is_the_dense_matrix():
    net, x, y = network()
    names, parameters = zip(*net.named_parameters(), strict=True)

    def outputs(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), x).reshape(-1)

    jacobian = dense(outputs, list(parameters))
    bend = torch.func.hessian(lambda z: functional.cross_entropy(z.reshape(7, 3), y))(net(x).detach().reshape(-1))
    expected = jacobian.T @ bend @ jacobian
    product = gauss_newton_product(lambda z: functional.cross_entropy(z, y), net(x), parameters)
    torch.testing.assert_close(flat(product(every_unit(list(parameters)))), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        flat(product([unit[:1] for unit in every_unit(list(parameters))]))[0], expected[0], rtol=0, atol=1e-12
    )


def test_what_is_linear_has_no_curvature_and_what_is_not_used_none():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    for rows in (1, 3):
        found = hessian_product((3 * a).sum(), [a, b])([torch.ones(rows, 2)] * 2)
        assert [part.shape for part in found] == [(rows, 2)] * 2
        assert all(not part.any() for part in found)
        found = hessian_product((a**2).sum(), [a, b])([torch.ones(rows, 2)] * 2)
        assert found[0].tolist() == [[2.0, 2.0]] * rows
        assert not found[1].any()
    linear = gauss_newton_product(lambda z: z.sum(), a**2, [a])([torch.ones(1, 2)])
    assert not linear[0].any()


def test_only_of_numbers():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(Error, match=r"one number.*\[2\]"):
        hessian_product(x**2, [x])
    with pytest.raises(Error, match=r"one number.*\[2\]"):
        gauss_newton_product(lambda z: z**2, x * 2, [x])
