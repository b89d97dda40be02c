"""Where training drives the weights of an attention layer: to the matrix that separates the best token by a margin.

Once a layer picks out one token of each sequence, only the direction of its weights goes on changing, towards the
solution of a support vector machine over tokens. How far it has come, and by which margin it chooses, can be read from
the weights and data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from weightsmith import solve
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._plain import plain
from weightsmith.inspect._report import Report
from weightsmith.solve import least_distance


@dataclass(frozen=True)
class AttentionSVM:
    """The matrix that chooses given tokens by a margin of 1 and is smallest."""

    weight: Tensor
    """``[d, d]``, float64: the score of token x for query z is ``x' W z``."""
    norm: str
    """Which is smallest: ``frobenius`` or ``nuclear``."""
    value: float
    gap: float
    """How far, as a share, the value may be above the least one; 0 where it is exact."""
    multipliers: Tensor
    """``[n, t]``, of each sequence and token; above 0 for support tokens."""

    def report(self) -> Report:
        """For people."""
        support = self.multipliers > 1e-9 * self.multipliers.max()
        singular = torch.linalg.svdvals(self.weight)
        figures = {
            "norm": self.norm,
            "value": self.value,
            "relative gap": self.gap,
            "support tokens": int(support.sum()),
            "rank": int((singular > 1e-6 * singular[0]).sum()),
            "effective rank": effective_rank(self.weight),
        }
        rows = [{"sequence": i, "support tokens": int(row.sum())} for i, row in enumerate(support)]
        return Report("Attention as a support vector machine", figures, rows)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return plain(dict(self.report().figures))


def token_differences(tokens: Tensor, queries: Tensor, chosen: Tensor) -> Tensor:
    r"""What the weights are asked about: one matrix for each token that was not chosen.

    .. math:: A_{it} = (x_{i,\text{chosen}} - x_{it})\, z_i^\top, \qquad \langle A_{it}, W \rangle \ge 1

    Args:
        tokens: ``[n, t, d]``.
        queries: ``[n, d]``.
        chosen: ``[n]`` places of tokens.

    Returns:
        ``[n, t, d * d]`` in float64; those of the chosen tokens are 0.
    """
    if tokens.dim() != 3 or queries.shape != (tokens.shape[0], tokens.shape[2]) or chosen.shape != tokens.shape[:1]:
        raise Error(
            f"needs tokens [n, t, d], queries [n, d], chosen [n]; got {list(tokens.shape)}, {list(queries.shape)}, "
            f"{list(chosen.shape)}"
        )
    if not len(tokens) or int(chosen.min()) < 0 or int(chosen.max()) >= tokens.shape[1]:
        raise Error(f"chosen= are places of the {tokens.shape[1]} tokens of at least one sequence")
    values, asked = tokens.detach().double().cpu(), queries.detach().double().cpu()
    best = values[torch.arange(len(values)), chosen.cpu().long()]
    return torch.einsum("ntd,ne->ntde", best[:, None] - values, asked).flatten(2)


@card(
    paper="Ataee Tarzanagh, Li, Thrampoulidis, Oymak 2023, 'Transformers as Support Vector Machines'",
    covers=("transformers-support-vector-machines",),
    needs=("data",),
    unit="model",
    claim="the weights of a trained attention layer point where it points",
)
def attention_svm(
    tokens: Tensor,
    queries: Tensor,
    chosen: Tensor,
    *,
    norm: str = "frobenius",
    steps: int = 2000,
    tolerance: float = 1e-4,
) -> AttentionSVM:
    r"""The smallest attention weights that choose given tokens by a margin.

    .. math:: \min_W \|W\| \quad \text{with} \quad (x_{i,\text{chosen}} - x_{it})^\top W z_i \ge 1
        \quad \text{for all } t \ne \text{chosen}

    Training W itself leads to the smallest Frobenius norm, training keys and queries with ``W = K' Q`` to the smallest
    nuclear norm.

    Args:
        tokens: ``[n, t, d]``.
        queries: ``[n, d]``; for self-attention of one place, that token.
        chosen: ``[n]``, the token of each sequence that should be chosen. A copy of it elsewhere in the sequence asks
            for nothing.
        norm: ``frobenius``, exact; or ``nuclear``, by alternating directions until the gap to a dual value, which is a
            proof, is below ``tolerance``.
        steps: at most, for the nuclear norm.
        tolerance: share of the value.

    Returns:
        AttentionSVM: the matrix, its norm, and the multipliers.

    Memory: n t d^2 numbers in float64, so this is for small models or for d after a projection.

    Raises:
        Error: shapes that do not fit, values that are not finite; no weights choose these tokens.
        MissingPackage: scipy is not installed.

    >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    >>> attention_svm(tokens, torch.tensor([[0.0, 2.0]]), torch.tensor([0])).weight.round(decimals=9).tolist()
    [[0.0, 0.5], [0.0, 0.0]]
    """
    if norm not in ("frobenius", "nuclear"):
        raise Error(f"norm= is 'frobenius' or 'nuclear', got {norm!r}")
    differences = token_differences(tokens, queries, chosen)
    count, length, width = tokens.shape
    rows = differences.reshape(count * length, -1)
    asked = (rows != 0).any(dim=1)
    if not bool(asked.any()):
        raise Error("no token differs from the chosen one: nothing is asked of the weights")
    bound = rows[asked].numpy()
    purpose = "attention_svm"
    if norm == "frobenius":
        weight, multipliers = least_distance(bound, numpy.ones(len(bound)), purpose=purpose)
        value, gap = float(numpy.linalg.norm(weight)), 0.0
    else:
        weight, multipliers, value, gap = _nuclear(bound, width, steps, tolerance)
    full = torch.zeros(count * length, dtype=torch.float64)
    full[asked] = torch.as_tensor(multipliers)
    return AttentionSVM(torch.as_tensor(weight).reshape(width, width), norm, value, gap, full.reshape(count, length))


def _nuclear(bound: Any, width: int, steps: int, tolerance: float) -> tuple[Any, Any, float, float]:
    """Alternating directions between half-spaces and singular values; stops by the gap to a feasible dual."""
    ones = numpy.ones(len(bound))
    weight, _ = least_distance(bound, ones, purpose="attention_svm")
    step = float(numpy.linalg.norm(weight)) / width**0.5 or 1.0  # of a singular value: sets the scale
    low, dual = weight.copy(), numpy.zeros_like(weight)
    best, best_weight, bound_below, best_multipliers = numpy.inf, weight, 0.0, ones * 0
    for _ in range(steps):
        weight, multipliers = least_distance(bound, ones, low - dual, purpose="attention_svm")
        left, singular, right = numpy.linalg.svd((weight + dual).reshape(width, width))
        low = ((left * numpy.maximum(singular - step, 0)) @ right).reshape(-1)
        dual += weight - low
        value = float(numpy.linalg.svd(weight.reshape(width, width), compute_uv=False).sum())
        if value < best:
            best, best_weight = value, weight
        # Any a >= 0 whose sum of constraints has no singular value above 1 proves that less than sum(a) is impossible.
        largest = float(numpy.linalg.norm((bound.T @ multipliers).reshape(width, width), 2))
        if largest > 0 and multipliers.sum() / largest > bound_below:
            bound_below, best_multipliers = multipliers.sum() / largest, multipliers / largest
        if best - bound_below <= tolerance * best:
            break
    return best_weight, best_multipliers, best, max(best - bound_below, 0.0) / best


@card(
    paper="Ataee Tarzanagh, Li, Thrampoulidis, Oymak 2023, 'Transformers as Support Vector Machines'",
    covers=("transformers-support-vector-machines",),
    needs=("data",),
    unit="model",
    claim="its correlation tells how far training has gone towards the margin's direction",
)
def attention_margin(
    weight: Tensor | tuple[Tensor, Tensor],
    tokens: Tensor,
    queries: Tensor,
    chosen: Tensor | None = None,
    *,
    nuclear: bool = False,
) -> Report:
    r"""How attention weights choose among tokens: by which margin, at which rank, and how near to the largest margin.

    .. math:: \text{margin} = \min_{i,t} \frac{(x_{i,\text{chosen}} - x_{it})^\top W z_i}{\|W\|_F}

    Args:
        weight: ``W [d, d]``, with scores ``x' W z``; or ``(key, query)``, the weights ``[inner, d]`` of two linear
            layers, for ``W = key' query``.
        tokens: ``[n, t, d]``.
        queries: ``[n, d]``.
        chosen: ``[n]``; by default the tokens that these weights give most attention.
        nuclear: also solve for the smallest nuclear norm, which takes longer.

    Returns:
        Report: figures ``correlation`` (cosine with the solution of smallest Frobenius norm), ``margin``,
        ``largest margin``, ``nuclear norm a margin``, ``effective rank``; a row for every sequence.

    Raises:
        Error: as `attention_svm`; weights that are all 0 or not finite.

    >>> tokens, queries = torch.eye(3)[None], torch.eye(3)[:1]
    >>> found = attention_margin(torch.eye(3), tokens, queries)
    >>> found["margin"] > 0, round(found["largest margin"] ** 2, 6)
    (True, 1.5)
    """
    pair = isinstance(weight, tuple)
    product = (weight[0].double().T @ weight[1].double() if isinstance(weight, tuple) else weight.double()).detach()
    product = product.cpu()
    width = tokens.shape[-1]
    if product.shape != (width, width):
        raise Error(f"the weights [d, d] do not fit tokens of width {width}: {list(product.shape)}")
    size = product.norm()
    if not 0 < float(size) < torch.inf:
        what = "all 0" if float(size) == 0 else "not all finite numbers"
        raise Error(f"the attention weights are {what}: they choose nothing")
    scores = torch.einsum("ntd,de,ne->nt", tokens.detach().double().cpu(), product, queries.detach().double().cpu())
    places = scores.argmax(dim=1) if chosen is None else chosen.cpu()
    differences = token_differences(tokens, queries, places)
    margins = differences @ product.flatten()
    counted = (differences != 0).any(dim=2)
    least = margins.masked_fill(~counted, torch.inf).amin(dim=1)
    solved = attention_svm(tokens, queries, places)
    margin = float(least.min() / size)
    figures: dict[str, Any] = {
        "correlation": float((product * solved.weight).sum() / size / solved.weight.norm()),
        "margin": margin,
        "largest margin": 1 / solved.value,
        "chosen above all others": float((least > 0).double().mean()),
        "mean attention of the chosen": float(scores.softmax(1).gather(1, places[:, None].long()).mean()),
        "nuclear norm": float(torch.linalg.svdvals(product).sum()),
        "nuclear norm a margin": float(torch.linalg.svdvals(product).sum() / least.min()) if margin > 0 else None,
        "effective rank": effective_rank(product),
        "support tokens": int((solved.multipliers > 1e-9 * solved.multipliers.max()).sum()),
    }
    if nuclear:
        other = attention_svm(tokens, queries, places, norm="nuclear")
        figures["correlation, nuclear"] = float((product * other.weight).sum() / size / other.weight.norm())
        figures["least nuclear norm a margin"] = other.value
    probabilities = scores.softmax(dim=1)
    rows = [
        {"sequence": i, "chosen": int(place), "margin": float(least[i] / size),
         "attention": float(probabilities[i, place])}
        for i, place in enumerate(places.tolist())
    ]  # fmt: skip
    notes = ("Of the product of keys and queries; its own limit is the smallest nuclear norm.",) if pair else ()
    return Report("Attention's margin", figures, rows, notes=notes)


def effective_rank(weight: Tensor) -> float:
    r"""The exponential of the entropy of the singular values' shares.

    >>> round(effective_rank(torch.eye(3)), 6)
    3.0
    """
    return solve.effective_rank(torch.linalg.svdvals(weight.double()))
