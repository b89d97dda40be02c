"""Products of vectors with the curvature of a loss: exact, without ever holding the matrix.

Differentiating a gradient once more along a direction gives the Hessian times that direction, for the
price of about two gradients (Pearlmutter 1994, 'Fast Exact Multiplication by the Hessian'). The Gauss-Newton
matrix leaves out the curvature of the network itself, so it has no negative eigenvalue where the loss is
convex in the outputs (Schraudolph 2002, 'Fast Curvature Matrix-Vector Products').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weightsmith.errors import Error

Product = Callable[[Sequence[Tensor]], list[Tensor]]
"""``vectors [b, *shape], one a parameter -> products [b, *shape]``."""


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Product:
    r"""The Hessian of a scalar loss, as a function to be applied as often as wanted.

    .. math:: H v = \nabla\, (\nabla L \cdot v)

    Args:
        loss: a number with its graph; it is kept for as long as the function that is returned.
        parameters: what to differentiate by; those that the loss does not depend on have zeros.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_product((x ** 3).sum(), [x])([torch.eye(2)])
    [tensor([[ 6.,  0.],
            [ 0., 12.]])]
    """
    if loss.numel() != 1:
        raise Error(f"a Hessian is of one number; the loss has shape {list(loss.shape)}")
    gradients = torch.autograd.grad(loss.sum(), parameters, create_graph=True, materialize_grads=True)
    return _vector_jacobian(gradients, parameters)


def gauss_newton_product(loss: Callable[[Tensor], Tensor], outputs: Tensor, parameters: Sequence[Tensor]) -> Product:
    r"""The Gauss-Newton matrix, as a function to be applied as often as wanted.

    .. math:: G v = J^\top\, \nabla^2_z \ell\; J v

    Args:
        loss: ``outputs -> number``.
        outputs: of the network, with their graph.
        parameters: what the outputs' Jacobian J is by.

    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> gauss_newton_product(lambda z: z ** 2 / 2, x ** 2, [x])([torch.ones(1, 1)])    # (2 x)^2, and not 6 x^2
    [tensor([[36.]])]
    """
    cut = outputs.detach().requires_grad_()
    found = loss(cut)
    if found.numel() != 1:
        raise Error(f"a Gauss-Newton matrix is of one number; the loss has shape {list(found.shape)}")
    (slope,) = torch.autograd.grad(found.sum(), cut, create_graph=True, materialize_grads=True)
    # The Jacobian times a vector, by differentiating its transpose, which is linear in a vector that does not matter.
    free = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, parameters, free, create_graph=True, materialize_grads=True)
    forward, bend = _vector_jacobian(pulled, [free]), _vector_jacobian([slope], [cut])
    backward = _vector_jacobian([outputs], parameters)
    return lambda vectors: backward(bend(forward(vectors)))


def _vector_jacobian(values: Sequence[Tensor], by: Sequence[Tensor]) -> Product:
    """Vectors ``[b, *shape]`` of the values to vectors of what they were made from."""
    usable = [i for i, value in enumerate(values) if value.requires_grad]

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        rows = len(vectors[0])
        if not usable:  # linear: nothing bends
            return [value.new_zeros(rows, *value.shape) for value in by]
        chosen, given = [values[i] for i in usable], [vectors[i] for i in usable]
        if rows > 1:
            try:
                found = torch.autograd.grad(
                    chosen, by, given, retain_graph=True, is_grads_batched=True, materialize_grads=True
                )
            except RuntimeError:  # not every operation can be vectorised; one by one shows what is really wrong
                pass
            else:  # the zeros of what was not used come without rows
                return [part.expand(rows, *value.shape) for part, value in zip(found, by, strict=True)]
        each = [
            torch.autograd.grad(
                chosen, by, [vector[row] for vector in given], retain_graph=True, materialize_grads=True
            )
            for row in range(rows)
        ]
        return [torch.stack(column) for column in zip(*each, strict=True)]

    return product
