"""What contrastive learning does to the weights of a layer: a covariance operator that amplifies what it finds.

Take an example's connection to a layer: how its outputs depend on that layer's weights, averaged over augmented
views. What varies between views is averaged away; what varies between examples stays. The gradient step of a
contrastive loss multiplies the weights by the covariance of these averages, so whatever tells examples apart and
survives augmentation grows, from a random beginning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._models import untouched
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.training._parts import at_least, cosine
from weightsmith.solve import effective_rank
from weightsmith.weights import working

Contrast = Literal["simple", "nce"]


def contrastive_loss(outputs: Tensor, *, loss: Contrast = "simple", temperature: float = 0.5) -> Tensor:
    r"""A contrastive loss of squared distances between the views of some examples.

    .. math:: r = \tfrac12 \lVert f - f' \rVert^2, \qquad L_{\text{simple}} = \mathbb E\, r_+ - \mathbb E\, r_-, \qquad
        L_{\text{nce}} = -\mathbb E \log \frac{e^{-r_+ / \tau}}{e^{-r_+ / \tau} + \sum_k e^{-r_k / \tau}}

    Args:
        outputs: ``[n, views, c]``, at least two views for ``"nce"``.
        loss: ``"simple"``: two views are drawn of one example (:math:`r_+`) and of two examples (:math:`r_-`), with
            replacement. ``"nce"``: an example's view against another of its views, with the views of that kind of all
            other examples as negatives; the mean over ordered pairs of views.
        temperature: :math:`\tau`.

    Returns:
        A number, float32 or wider. Memory of ``"nce"``: ``n * n * c``.

    Raises:
        ValueError: another loss, outputs of other axes, too few views, a temperature not above 0.

    >>> contrastive_loss(torch.tensor([[[0.0], [0.0]], [[2.0], [2.0]]]))
    tensor(-1.)
    """
    _asked(outputs, loss, temperature)
    outputs, views = working(outputs), outputs.shape[1]
    if loss == "simple":  # the variance of views within examples, less that of all: minus that of examples' means
        means = outputs.mean(dim=1)
        return -(means - means.mean(dim=0)).square().sum(dim=-1).mean()
    total = outputs.new_zeros(())
    for first in range(views):
        for second in range(views):
            if first != second:
                distances = _half_squares(outputs[:, first], outputs[:, second]) / temperature
                total = total + (distances.diagonal() + (-distances).logsumexp(dim=1)).mean()
    return total / (views * (views - 1))


def _asked(views: Tensor, loss: str, temperature: float) -> None:
    """An error for what no contrastive loss can be computed of: views or their outputs ``[n, views, ...]``."""
    if loss not in get_args(Contrast):
        raise Error(f"loss is one of {', '.join(get_args(Contrast))}; got {loss!r}")
    if not temperature > 0:
        raise Error(f"temperature is above 0, got {temperature}")
    if views.dim() < 3 or not len(views) or views.shape[1] < (2 if loss == "nce" else 1):
        raise Error(f"views are [n, views, ...], with at least 2 views for nce; got {list(views.shape)}")


def _half_squares(first: Tensor, second: Tensor) -> Tensor:
    """Half the squared distances, ``[..., m, c]`` and ``[..., k, c]`` to ``[..., m, k]``."""
    return (first[..., :, None, :] - second[..., None, :, :]).square().sum(dim=-1) / 2


@dataclass(frozen=True)
class Covariance:
    """The operator of a layer, and how it acts beside the true gradient."""

    connections: Tensor
    """``[n, views, weights, outputs]``: how each view's outputs depend on the layer's weights."""
    weight: Tensor
    """``[weights]``: the layer's, flattened."""
    descent: Tensor
    """``[weights]``: minus the gradient of the loss."""
    exact: Tensor
    """``[weights]``: the operator of all pairs of views, times the weights."""
    predicted: Tensor
    """``[weights]``: the covariance operator, times the weights."""
    values: Tensor
    """``[r]`` eigenvalues of the covariance operator, descending."""
    vectors: Tensor
    """``[r, weights]``, of length one."""

    def report(self) -> Report:
        """How well the operator predicts the step, and along what it acts."""
        share = (self.vectors @ self.descent).square() / self.descent.square().sum()
        held = (self.vectors @ self.weight).square() / self.weight.square().sum()
        rows = [
            {"rank": i + 1, "eigenvalue": v, "share of the step": s, "share of the weights": h}
            for i, (v, s, h) in enumerate(zip(self.values.tolist(), share.tolist(), held.tolist(), strict=True))
        ]
        top = max(len(rows) // 10, 1)
        figures: dict[str, Any] = {
            "cosine, covariance": cosine(self.predicted, self.descent),
            "length, covariance": _length(self.predicted, self.descent),
            "cosine, exact": cosine(self.exact, self.descent),
            "length, exact": _length(self.exact, self.descent),
            "largest eigenvalue": float(self.values[0]) if len(self.values) else 0.0,
            "effective rank": effective_rank(self.values.clamp(min=0)),
            f"share of the step in the first {top}": float(share[:top].sum()),
        }
        ranks = [row["rank"] for row in rows]
        plots = [
            Plot("Spectrum of the operator", "rank", "eigenvalue", [Line("eigenvalue", ranks, self.values.tolist())]),
            Plot("Where the step goes", "rank", "share", [Line(c, ranks, [row[c] for row in rows])
                 for c in ("share of the step", "share of the weights")]),
        ]  # fmt: skip
        return Report("Covariance operator of contrastive learning", figures, rows, plots)


def _length(found: Tensor, true: Tensor) -> float:
    scale = float(true.norm())
    return float(found.norm()) / scale if scale else math.nan


@card(
    paper="Tian, Yu, Chen, Ganguli 2020, 'Understanding Self-supervised Learning with Dual Deep Networks'",
    covers=("dual-deep-networks",),
    needs=("data",),
    unit="model",
    claim="the covariance of mean connections times the weights is the gradient step of the simple contrastive loss",
    departs="the operator is kept as a factor, never as a matrix; expectations are means over the given views",
)
def contrastive_operator(
    model: nn.Module,
    views: Tensor,
    layer: str,
    *,
    loss: Contrast = "simple",
    temperature: float = 0.5,
    at_once: int = 64,
) -> Covariance:
    r"""The covariance operator that a contrastive loss applies to a layer's weights, against the true gradient.

    .. math:: K(x) = f_{l-1}(x) \otimes J_l(x)^\top, \quad \bar K(x) = \mathbb E_{x' \sim \text{aug}(x)} K(x'), \quad
        -\nabla_W L_{\text{simple}} = 2\, \mathbb V_x[\bar K]\, \operatorname{vec} W

    and for the InfoNCE loss, with :math:`\beta_{ik}` the softmax weight of negative k,

    .. math:: -\nabla_W L_{\text{nce}} \approx \frac1{n \tau} \sum_{i \ne k} \beta_{ik}
        (\bar K_i - \bar K_k)(\bar K_i - \bar K_k)^\top \operatorname{vec} W

    The factor 2 is there because both views' paths through W count. The operator of all pairs, before views are
    averaged, is exact for both losses. That it acts on W rests on the outputs being homogeneous of degree one in W:
    ReLU networks without biases (and without normalisation) are.

    Args:
        model: ``[n, ...] -> [n, c]``; in evaluation mode, left as it was. ReLU or linear, without biases.
        views: ``[n, views, ...]``: augmented views of n >= 2 examples; at least two views for ``"nce"``.
        layer: name of the parameter W, such as ``"0.weight"``.
        loss: ``"simple"`` or ``"nce"``: `contrastive_loss`.
        temperature: of ``"nce"``.
        at_once: views whose connections are computed together.

    Returns:
        Covariance: with ``report()``. Memory: about three times ``n * views * c`` times the size of W, in float64.

    Raises:
        ValueError: too few examples or views, an unknown parameter, outputs of other axes, not finite, or not
            homogeneous in W.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> views = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    >>> found = contrastive_operator(net, views, "weight")      # the second input does not survive the views
    >>> found.values.float(), found.vectors.abs().float(), round(found.report()["cosine, covariance"], 4)
    (tensor([2.]), tensor([[1., 0.]]), 1.0)
    """
    known = dict(model.named_parameters())
    if layer not in known:
        raise Error(f"the model has no parameter {layer!r}{did_you_mean(layer, known)}")
    _asked(views, loss, temperature)
    at_least(1, at_once=at_once)
    at_least(2, examples=len(views))
    with untouched(model):
        held = {name: working(value.detach()) for name, value in [*known.items(), *model.named_buffers()]}
        start = held.pop(layer)

        def outputs(weight: Tensor, inputs: Tensor) -> Tensor:
            return functional_call(model, {**held, layer: weight}, (inputs,))

        flat = working(views.flatten(0, 1))
        found = outputs(start, flat).detach()
        if found.dim() != 2 or len(found) != len(flat):
            raise Error(f"the model gives one row of outputs [c] a view; got {list(found.shape)} of {len(flat)} views")
        if not found.isfinite().all():
            raise Error("outputs of the model are not all finite: look at its weights and at the views")
        slopes = vmap(jacrev(lambda weight, one: outputs(weight, one[None])[0]), in_dims=(None, 0))
        jacobian = torch.cat([slopes(start, part).detach().flatten(2) for part in flat.split(at_once)])

        def asked(weight: Tensor) -> Tensor:
            seen = outputs(weight, flat).unflatten(0, views.shape[:2])
            return contrastive_loss(seen, loss=loss, temperature=temperature)

        descent = -grad(asked)(start)
    connections = jacobian.mT.reshape(*views.shape[:2], start.numel(), -1).double()
    vector = start.double().flatten()
    rebuilt = torch.einsum("navc,v->nac", connections, vector)
    truth = found.double().reshape(rebuilt.shape)
    if not torch.allclose(rebuilt, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max())):
        raise Error(
            f"the outputs are not the connections times {layer!r}: the model is not homogeneous in it; take a ReLU "
            "network without biases and normalisation"
        )
    means = connections.mean(dim=1)
    if loss == "simple":
        factor = (means - means.mean(dim=0)).movedim(0, 1).flatten(1) * math.sqrt(2 / len(views))
    else:
        factor = _factor_nce(means, _beta(truth, temperature), temperature)
    values, vectors = _spectrum(factor)
    predicted = factor @ (factor.T @ vector)
    # All pairs of views less those of one example leave the covariance of examples' means: averaging loses nothing.
    exact = predicted if loss == "simple" else _pairs_nce(connections, truth, temperature)
    return Covariance(connections, vector, descent.double().flatten(), exact, predicted, values, vectors)


def _spectrum(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding of ``factor factor'``, descending, and their vectors in rows."""
    wide = factor.shape[1] >= factor.shape[0]
    values, vectors = torch.linalg.eigh(factor @ factor.T if wide else factor.T @ factor)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > 1e-12 * values.max()
    if not wide:
        vectors = factor @ vectors / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    return values[kept], vectors.T[kept]


def _beta(outputs: Tensor, temperature: float) -> Tensor:
    """Softmax weights ``[n, n]``, the mean over ordered pairs of views; an example's own falls out of differences."""
    views = outputs.shape[1]
    total = outputs.new_zeros(len(outputs), len(outputs))
    for first in range(views):
        for second in range(views):
            if first != second:
                distances = _half_squares(outputs[:, first], outputs[:, second]) / temperature
                total += (-distances).softmax(dim=1)
    return total / (views * (views - 1))


def _factor_nce(means: Tensor, beta: Tensor, temperature: float) -> Tensor:
    r"""A factor of the sum over pairs: with a symmetric weight it is a Laplacian, :math:`\sum_{ij} L_{ij} K_i K_j'`."""
    weight = (beta + beta.T) / (len(beta) * temperature)
    laplacian = weight.sum(dim=1).diag() - weight
    values, vectors = torch.linalg.eigh(laplacian)
    root = vectors * values.clamp(min=0).sqrt()
    return torch.einsum("nvc,nr->vrc", means, root).flatten(1)


def _pairs_nce(connections: Tensor, outputs: Tensor, temperature: float) -> Tensor:
    """Pairs of views weighted as the loss does: negatives by their softmax weight, the positive by their sum."""
    views, n = outputs.shape[1], len(outputs)
    total = connections.new_zeros(connections.shape[2])
    for first in range(views):
        for second in range(views):
            if first == second:
                continue
            one, other = connections[:, first], connections[:, second]
            f, g = outputs[:, first], outputs[:, second]
            weight = (-_half_squares(f, g) / temperature).softmax(dim=1)
            weight = weight - torch.eye(n, dtype=weight.dtype, device=weight.device)  # the positive, less all
            # The sums over the other example first: of w_ik (f_i - g_k), for every i and for every k.
            total = total + torch.einsum("ivc,ic->v", one, weight.sum(dim=1)[:, None] * f - weight @ g)
            total = total - torch.einsum("kvc,kc->v", other, weight.T @ f - weight.sum(dim=0)[:, None] * g)
    return total / (n * temperature * views * (views - 1))
