"""Which data a fine-tune was trained on, told from its weights and those it was started from.

What training adds to the weights is a sum of gradients. So among many candidates, those whose gradients together point
along the difference of the two checkpoints are like what it was trained on, or teach the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.stats import example_gradients, fitted, project
from weightsmith.stats.room import Batch, Loss, chosen_names, default_forward, restored
from weightsmith.weights import Pattern, matches, working


@dataclass(frozen=True)
class Selected:
    """Candidates, the most telling first."""

    indices: Tensor
    """``[k]`` places in the pool, in the order in which they were chosen."""
    cosines: Tensor
    """``[k]``: the cosine of the sum so far with the difference of the checkpoints."""
    alone: Tensor
    """``[n]``: the cosine of each candidate of the pool by itself."""

    def report(self) -> Report:
        """How near the sum of what was chosen comes to the difference of the checkpoints."""
        steps = list(range(1, len(self.indices) + 1))
        line = Line("cosine", steps, self.cosines.tolist())
        figures = {
            "chosen": len(self.indices),
            "pool": len(self.alone),
            "cosine": float(self.cosines[-1]),
            "best cosine": float(self.cosines.max()),
            "cosine of the best alone": float(self.alone.max()),
        }
        rows = [
            {"example": index, "cosine so far": so_far, "cosine alone": float(self.alone[index])}
            for index, so_far in zip(self.indices.tolist(), self.cosines.tolist(), strict=True)
        ]
        return Report(
            "Training data from weights", figures, rows, [Plot("Matching", "examples chosen", "cosine", [line])]
        )


@card(
    paper="Morris, Yin, Kim, Shmatikov, Rush 2025, 'Approximating Language Model Training Data from Weights': SELECT",
    covers=("data-from-weights",),
    needs=("data",),
    unit="model",
    claim="what it chooses holds more of the true training data, and trains better, than a random choice",
    departs="gradients are brought to one length before they are summed, and may be averaged over points of the line",
)
def training_data(
    model: nn.Module,
    first: Any,
    second: Any,
    pool: Iterable[Batch],
    count: int,
    *,
    labels: Literal["given", "second"] = "given",
    points: Sequence[float] = (0.0,),
    dim: int = 1024,
    batch: int = 1,
    equal: bool = True,
    pattern: Pattern = "*",
    seed: int = 0,
    at_once: int = 64,
    loss: Loss | None = None,
) -> Selected:
    r"""The examples of a pool whose gradients together best match what training did to the weights.

    .. math:: \max_{S, |S| = k} \cos\Bigl(P^\top(\theta_1 - \theta_0),\;
        -\sum_{i \in S} P^\top \nabla_\theta \ell(\theta; x_i)\Bigr)

    greedily, with the gradients at :math:`\theta_0` or averaged over points of the line to :math:`\theta_1`.

    Args:
        model: the architecture; its own weights are neither used nor changed.
        first, second: :math:`\theta_0` and :math:`\theta_1`: anything that `weightsmith.open` opens.
        pool: batches of candidates.
        count: how many to choose, k.
        labels: ``"second"`` takes the second checkpoint's answers for the labels of ``inputs`` or
            ``(inputs, labels)``.
        points: shares of the line at which gradients are taken.
        dim: numbers that a gradient is squeezed into.
        batch: candidates chosen at once; more is faster and less exact.
        equal: bring every gradient to length 1 first. Without, the sum is filled up with examples whose gradients
            are small and say nothing: they spoil its direction least.
        pattern: names of the parameters that count: the last layers of a large model.
        seed: of the projection.
        at_once: examples whose exact gradients are held together.
        loss: as for `weightsmith.stats.example_gradients`.

    Returns:
        Selected: ``indices [k]``, ``cosines [k]``, ``alone [n]``.

    Raises:
        ValueError: fewer candidates than are to be chosen, equal checkpoints, checkpoints of another model.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> ends = {"weight": torch.zeros(1, 2)}, {"weight": torch.tensor([[-1.0, 0.0]])}
    >>> pool = [torch.tensor([[0.0, 1.0], [1.0, 0.0]])]
    >>> training_data(layer, *ends, pool, 1, loss=lambda m, x: m(x).sum(), dim=512).indices
    tensor([1])
    """
    if not points:
        raise Error("training_data needs at least one of points=")
    start, end = fitted(model, first), fitted(model, second)
    own = [name for name, value in model.named_parameters() if value.is_floating_point()]
    names = [name for name in own if matches(pattern, name)]
    chosen_names(own, names, pattern)
    moved = {name: (end[name].double() - start[name].double()).float()[None] for name in names}
    target = project(moved, dim, seed)[0].double()
    if not float(target.norm()) > 0:
        raise Error("the two checkpoints are equal where the pattern looks: nothing was trained")
    batches = list(pool) if labels == "given" else _answered(model, end, pool)
    total: Tensor | None = None
    for point in points:
        between = {
            name: torch.lerp(working(value), working(end[name]), point).to(value.dtype)
            if value.is_floating_point()
            else value
            for name, value in start.items()
        }
        found = example_gradients(
            model, batches, dim=dim, seed=seed, pattern=pattern, weights=between, at_once=at_once, loss=loss
        )
        total = -found.double() if total is None else total - found.double()
    assert total is not None
    vectors = nn.functional.normalize(total, dim=1) if equal else total
    indices, cosines = matching_pursuit(vectors, target, count, batch)
    sizes = total.norm(dim=1) * target.norm()
    return Selected(indices, cosines, (total @ target) / sizes.clamp(min=torch.finfo(sizes.dtype).tiny))


@card(
    paper="Morris, Yin, Kim, Shmatikov, Rush 2025, 'Approximating Language Model Training Data from Weights': "
    "greedy selection",
    covers=("data-from-weights",),
    unit="model",
    claim="every choice is the one after which the sum's cosine with the target is highest",
)
def matching_pursuit(vectors: Tensor, target: Tensor, count: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    r"""Vectors, one after the other, whose sum comes nearest to the direction of a target.

    .. math:: i_{t+1} = \arg\max_{i \notin S_t} \cos\bigl(s_t + v_i,\; g\bigr), \qquad s_t = \sum_{i \in S_t} v_i

    Args:
        vectors: ``[n, d]``.
        target: ``[d]``.
        count: how many to choose; none is chosen twice.
        batch: how many to add at once: the best ones by the same rule.

    Returns:
        ``[count]`` indices, and ``[count]`` the cosine of the sum up to and with each.

    Raises:
        ValueError: fewer vectors than are to be chosen, a target of zeros, values that are not finite, shapes that do
            not fit.

    >>> vectors = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    >>> matching_pursuit(vectors, torch.tensor([1.0, 0.0]), 2)[0]
    tensor([0, 2])
    """
    if vectors.dim() != 2 or target.shape != vectors.shape[1:]:
        raise Error(f"vectors are [n, d] and the target [d]; got {list(vectors.shape)} and {list(target.shape)}")
    if not 1 <= count <= len(vectors) or batch < 1:
        raise Error(f"cannot choose {count} of {len(vectors)} candidates, {batch} at once")
    vectors, target = vectors.double(), target.double()
    tiny = torch.finfo(torch.float64).tiny
    if not (vectors.isfinite().all() and target.isfinite().all()):
        raise Error("the vectors or the target of a matching hold values that are not finite")
    if not float(target.norm()) > 0:
        raise Error("the target of a matching is all zeros")
    goal = target / target.norm()
    along, sizes = vectors @ goal, vectors.square().sum(dim=1)
    total, taken = torch.zeros_like(goal), torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    indices: list[Tensor] = []
    while (chosen := sum(map(len, indices))) < count:
        squares = (total @ total + 2 * (vectors @ total) + sizes).clamp(min=0)
        cosines = (total @ goal + along) / squares.sqrt().clamp(min=tiny)
        best = cosines.masked_fill(taken, -torch.inf).topk(min(batch, count - chosen)).indices
        indices.append(best)
        taken[best] = True
        total = total + vectors[best].sum(dim=0)
    order = torch.cat(indices)
    sums = vectors[order].cumsum(dim=0)
    return order, (sums @ goal) / sums.norm(dim=1).clamp(min=tiny)


def _answered(model: nn.Module, weights: dict[str, Tensor], pool: Iterable[Batch]) -> list[Batch]:
    """The pool with the labels that a checkpoint gives."""
    made = []
    with restored(model), torch.no_grad():
        for batch in pool:
            if not isinstance(batch, Tensor | list | tuple):
                raise Error('labels="second" needs batches of inputs or (inputs, labels)')
            inputs = batch if isinstance(batch, Tensor) else batch[0]
            logits = default_forward(lambda *given: functional_call(model, weights, given), inputs)
            made.append((inputs, logits.argmax(dim=-1)))
    return made
