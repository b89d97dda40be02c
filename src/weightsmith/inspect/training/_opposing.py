"""Which few examples make the loss go up and down: pairs of groups that pull the weights in opposite directions.

Where a strong feature (much sky in an image) stands for one label in some examples and for another in others, a
step along it helps the ones as much as it harms the others. Training balances them on a narrow ridge, and with large
steps it swings across: the losses of a few such examples jump up and down in turn while the others barely move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of, untouched
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.training._parts import cosine, middle
from weightsmith.solve import hessian_product
from weightsmith.stats import Batch, Loss
from weightsmith.stats.room import default_forward, default_loss, mapped, size
from weightsmith.weights import Pattern, working

ExampleLosses = Callable[[Any, Batch], Tensor]
"""``(model, batch) -> [n]``."""


def example_losses(model: nn.Module, batches: Iterable[Batch], *, losses: ExampleLosses | None = None) -> Tensor:
    """The loss of every example, in the order of the data.

    Args:
        model: asked in evaluation mode, left as it was.
        batches: ``(inputs, labels)``.
        losses: ``(model, batch) -> [n]``, where the default (cross-entropy of classes) does not fit.

    Returns:
        ``[n]``, float32 or wider.

    Raises:
        ValueError: no batch, or losses that are not one number an example.

    >>> layer = torch.nn.Linear(1, 1)
    >>> example_losses(layer, [(torch.ones(2, 1), torch.tensor([0.0, 1.0]))], losses=lambda m, b: b[1])
    tensor([0., 1.])
    """
    found: list[Tensor] = []
    with untouched(model), torch.no_grad():
        for batch in batches:
            part = (losses or _cross_entropies)(model, batch)
            if part.shape != (size(batch),):
                raise Error(f"losses= must give one number an example, got {list(part.shape)} for {size(batch)}")
            found.append(part.detach())
    if not found:
        raise Error("example_losses needs at least one batch of data, got none")
    return torch.cat(found)


def _cross_entropies(model: nn.Module, batch: Batch) -> Tensor:
    logits = default_forward(model, batch)
    if not isinstance(batch, list | tuple) or len(batch) < 2 or logits.dim() != 2:
        raise Error("the default loss knows batches (inputs, labels) and logits [n, classes]; give losses=")
    return functional.cross_entropy(working(logits), batch[1], reduction="none")


def opposing_groups(before: Tensor, after: Tensor, *, share: float = 0.01) -> tuple[Tensor, Tensor]:
    """The examples whose loss rose most in a step, and those whose loss fell most.

    Args:
        before, after: ``[n]`` losses of the same examples in the same order, one step apart.
        share: of all examples, in each group; at least one example, and the groups never overlap.

    Returns:
        Two tensors of indices, the most changed first.

    Raises:
        ValueError: losses that do not fit, fewer than two examples, a share outside (0, 0.5], losses not finite.

    >>> up, down = opposing_groups(torch.zeros(4), torch.tensor([0.1, 3.0, -2.0, 0.0]), share=0.25)
    >>> up.tolist(), down.tolist()
    ([1], [2])
    """
    count = _group_size(before, after, share)
    order = (after.double() - before.double()).argsort(stable=True)
    return order[-count:].flip(0), order[:count]


def _group_size(before: Tensor, after: Tensor, share: float) -> int:
    if before.dim() != 1 or before.shape != after.shape or len(before) < 2:
        raise Error(f"losses are [n] of the same n >= 2 examples, got {list(before.shape)} and {list(after.shape)}")
    if not 0 < share <= 0.5:
        raise Error(f"share of each group lies in (0, 0.5], got {share}")
    if not (before.isfinite().all() and after.isfinite().all()):
        raise Error("losses of examples are not all finite: the run has diverged, look at earlier steps")
    return min(max(round(share * len(before)), 1), len(before) // 2)


@card(
    paper="Rosenfeld, Risteski 2024, 'Outliers with Opposing Signals Have an Outsized Effect on Neural Network "
    "Optimization'",
    covers=("outliers-opposing-signals-have",),
    needs=("data",),
    unit="model",
    claim="gradients of the two groups whose losses change most have a far lower cosine than those of other outliers",
    departs="their feature is looked for in the mean of the inputs; its curvature is taken along the difference of the "
    "two groups' mean gradients",
)
def opposing_signals(
    model: nn.Module,
    batch: Batch,
    before: Tensor,
    after: Tensor,
    *,
    share: float = 0.01,
    loss: Loss | None = None,
    pattern: Pattern = "*",
    seed: int = 0,
) -> Report:
    r"""How the two groups whose losses a step changed most pull at the weights.

    .. math:: \cos(g_\uparrow, g_\downarrow), \qquad
        \frac{\sum_{i \in \uparrow \cup \downarrow} |\Delta \ell_i|}{\sum_i |\Delta \ell_i|}, \qquad
        d^\top H d,\quad d = \frac{g_\uparrow - g_\downarrow}{\lVert g_\uparrow - g_\downarrow \rVert}

    with :math:`g` the mean gradient of a group and H the Hessian of the mean loss.

    Args:
        model: at either end of the step (or between); in evaluation mode, left as it was.
        batch: all examples, in the order of the losses: ``(inputs, labels)`` or a mapping.
        before, after: ``[n]`` losses at the two ends of one step: `example_losses`.
        share: of the examples, in each group.
        loss: ``(model, batch) -> number``, summed over examples; by default cross-entropy.
        pattern: names of the parameters whose gradients count.
        seed: of two random groups, for comparison.

    Returns:
        Report: ``gradient cosine`` of the groups, and that of two disjoint random ones of the same size; ``share of
        change`` they have in the sum of absolute changes; ``curvature`` of the mean loss along their difference and
        along a random direction; ``input cosine`` of the groups' mean inputs, from the mean of all. A row a group:
        mean losses, ``gradient`` norm, and how far its mean input lies off, over what is expected of random groups.

    Raises:
        ValueError: losses that do not fit the batch, a share outside (0, 0.5].
    """
    before, after = before.detach().cpu(), after.detach().cpu()
    up, down = opposing_groups(before, after, share=share)
    if size(batch) != len(before):
        raise Error(f"{len(before)} losses but a batch of {size(batch)} examples; give all of them in one batch")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(before), generator=generator)
    count = len(up)
    groups = {"up": up, "down": down, "random": order[:count], "other random": order[count : 2 * count]}
    parameters = parameters_of(model, pattern)
    asked = loss or default_loss
    with untouched(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # other attention bends but once
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        slopes = {
            name: _slope(
                model, mapped(lambda value, chosen=chosen: value[chosen.to(value.device)], batch), asked, parameters
            )
            for name, chosen in groups.items()
        }
        difference = slopes["up"] - slopes["down"]
        noise = torch.randn(len(difference), generator=generator).to(difference)
        along, across = (_curvature(model, batch, asked, parameters, d) for d in (difference, noise))
    change = (after.double() - before.double()).abs()
    inputs = _inputs(batch)
    offsets = {name: inputs[chosen].mean(dim=0) - inputs.mean(dim=0) for name, chosen in groups.items()}
    expected = float((inputs.var(dim=0, unbiased=False).sum() / count).sqrt())
    rows = [
        {
            "group": name,
            "examples": count,
            "loss before": float(before[chosen].double().mean()),
            "loss after": float(after[chosen].double().mean()),
            "gradient": float(slopes[name].double().norm()),
            "input offset": float(offsets[name].norm()) / expected if expected else float("nan"),
        }
        for name, chosen in groups.items()
    ]
    total = float(change.sum())
    figures = {
        "gradient cosine": cosine(slopes["up"], slopes["down"]),
        "gradient cosine of random groups": cosine(slopes["random"], slopes["other random"]),
        "share of change": float(change[torch.cat([up, down])].sum()) / total if total else 0.0,
        "share of examples": 2 * count / len(before),
        "curvature": along,
        "curvature along a random direction": across,
        "input cosine": cosine(offsets["up"], offsets["down"]),
    }
    plot = Plot("Loss before and after", "loss before", "loss after",
                [Line(name, before[groups[name]].tolist(), after[groups[name]].tolist(), style="points")
                 for name in ("random", "up", "down")])  # fmt: skip
    return Report("Groups with opposing signals", figures, rows, [plot])


def _slope(model: nn.Module, batch: Batch, loss: Loss, parameters: dict[str, nn.Parameter]) -> Tensor:
    """The mean gradient over a batch, as one vector."""
    found = torch.autograd.grad(loss(model, batch) / size(batch), list(parameters.values()), materialize_grads=True)
    return torch.cat([working(part.detach().flatten()) for part in found])


def _curvature(
    model: nn.Module, batch: Batch, loss: Loss, parameters: dict[str, nn.Parameter], direction: Tensor
) -> float:
    """``d' H d`` of the mean loss, for the direction made one long; NaN where it is zero."""
    length = float(direction.double().norm())
    if not length:
        return float("nan")
    values = list(parameters.values())
    parts = (direction / length).split([value.numel() for value in values])
    unit = [part.view_as(value).to(value.dtype) for part, value in zip(parts, values, strict=True)]
    bent = hessian_product(loss(model, batch) / size(batch), values)([part[None] for part in unit])
    return sum(float((b[0].double() * part.double()).sum()) for b, part in zip(bent, unit, strict=True))


def _inputs(batch: Batch) -> Tensor:
    """The first tensor of a batch as ``[n, values]``, float64; tokens have no mean and count as nothing."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else (batch,)
    first = next(value for value in values if isinstance(value, Tensor) and value.dim())
    flat = first.detach().reshape(len(first), -1).cpu()
    return flat.double() if first.is_floating_point() else torch.zeros(len(first), 1, dtype=torch.float64)


@card(
    paper="Rosenfeld, Risteski 2024, 'Outliers with Opposing Signals Have an Outsized Effect on Neural Network "
    "Optimization'",
    covers=("outliers-opposing-signals-have",),
    unit="model",
    claim="a few examples make several times their share of the loss's change, most of it taken back a step later",
)
def loss_oscillation(losses: Tensor, *, share: float = 0.01) -> Report:
    r"""Who makes the loss swing along a run, and whether the same examples swing back.

    .. math:: \Delta_t = \ell_{t+1} - \ell_t \in \mathbb R^n, \qquad
        \text{alternation}_t = -\cos(\Delta_t, \Delta_{t-1})

    Args:
        losses: ``[steps, n]`` of the same n examples in the same order.
        share: of the examples in each of the two groups.

    Returns:
        Report: a row a step: the ``loss``, its ``change``, the ``share of change`` that the two groups have in the
        sum of absolute changes, ``alternation`` (1: every change is taken back), and ``swapped``, the share of the
        groups that stood in the other group at the step before. In the figures, means over steps; the ``step of most
        oscillation`` (absolute change times alternation; None where no two changes can be compared), and the examples
        that were in a group most often with how often.

    Raises:
        ValueError: fewer than two steps, losses that are not finite.

    >>> found = loss_oscillation(torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    >>> [round(found[name], 6) for name in ("mean alternation", "mean swapped", "mean share of change")]
    [1.0, 1.0, 1.0]
    """
    if losses.dim() != 2 or len(losses) < 2:
        raise Error(f"loss_oscillation needs losses [steps, n] of at least 2 steps, got {list(losses.shape)}")
    wide = losses.detach().double().cpu()
    changes = wide.diff(dim=0)
    rows: list[dict[str, Any]] = []
    times = torch.zeros(wide.shape[1], dtype=torch.long)
    previous: tuple[set[int], set[int]] | None = None
    for step, change in enumerate(changes):
        up, down = opposing_groups(wide[step], wide[step + 1], share=share)
        times[torch.cat([up, down])] += 1
        total = float(change.abs().sum())
        now = (set(up.tolist()), set(down.tolist()))
        swapped = float("nan")
        if previous is not None:
            swapped = (len(now[0] & previous[1]) + len(now[1] & previous[0])) / (2 * len(up))
        rows.append(
            {
                "step": step + 1,
                "loss": float(wide[step + 1].mean()),
                "change": float(change.mean()),
                "absolute change": total / len(change),
                "share of change": float(change[torch.cat([up, down])].abs().sum()) / total if total else 0.0,
                "alternation": -cosine(change, changes[step - 1]) if step else float("nan"),
                "swapped": swapped,
            }
        )
        previous = now
    swings = [row["absolute change"] * row["alternation"] for row in rows]
    known = [place for place, swing in enumerate(swings) if not math.isnan(swing)]
    largest = max(known, key=lambda place: swings[place], default=None)
    often = times.argsort(descending=True, stable=True)[:10]
    figures = {
        "steps": len(rows),
        "examples": wide.shape[1],
        "share of examples": 2 * _group_size(wide[0], wide[1], share) / wide.shape[1],
        "mean share of change": middle([row["share of change"] for row in rows]),
        "mean alternation": middle([row["alternation"] for row in rows]),
        "mean swapped": middle([row["swapped"] for row in rows]),
        "step of most oscillation": None if largest is None else rows[largest]["step"],
        "examples most often in a group": often.tolist(),
        "how often": times[often].tolist(),
    }
    steps = [row["step"] for row in rows]
    plots = [
        Plot("Loss", "step", "mean loss", [Line("loss", steps, [row["loss"] for row in rows])]),
        Plot("Who swings", "step", "share", [Line("share of change", steps, [row["share of change"] for row in rows]),
                                            Line("alternation", steps, [row["alternation"] for row in rows])]),
    ]  # fmt: skip
    return Report("Oscillation of the loss", figures, rows, plots)


class OpposingSignals:
    """Losses of the same examples, step after step: who swings, and with whom.

    Args:
        share: of the examples in each of the two groups.

    It keeps ``4 n`` bytes a step for n examples.

    >>> watch = OpposingSignals(share=0.25)
    >>> for losses in ([1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]):
    ...     watch.step(torch.tensor(losses))
    >>> watch.report()["mean swapped"]
    1.0
    """

    def __init__(self, share: float = 0.01) -> None:
        if not 0 < share <= 0.5:
            raise Error(f"share of each group lies in (0, 0.5], got {share}")
        self.share = share
        self.losses: list[Tensor] = []

    def step(self, losses: Tensor) -> None:
        """Note the losses ``[n]`` after a step; the examples and their order stay the same."""
        if losses.dim() != 1 or (self.losses and losses.shape != self.losses[0].shape):
            known = f", not {list(self.losses[0].shape)} as before" if self.losses else ""
            raise Error(f"step needs the losses [n] of the same examples, got {list(losses.shape)}{known}")
        self.losses.append(losses.detach().to("cpu", torch.float32, copy=True))

    def groups(self, step: int = -1) -> tuple[Tensor, Tensor]:
        """Indices of the examples that rose and fell most at a step; by default the last."""
        if len(self.losses) < 2:
            raise Error("groups need the losses of at least 2 steps")
        changed = range(1, len(self.losses))
        place = step + len(self.losses) if step < 0 else step
        if place not in changed:
            raise Error(f"step is one of 1 to {len(self.losses) - 1}, or counts from the last (-1), got {step}")
        return opposing_groups(self.losses[place - 1], self.losses[place], share=self.share)

    def report(self) -> Report:
        """`loss_oscillation` of what was noted."""
        if len(self.losses) < 2:
            raise Error("a report needs the losses of at least 2 steps")
        return loss_oscillation(torch.stack(self.losses), share=self.share)
