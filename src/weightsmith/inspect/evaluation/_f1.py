"""One figure for many classes: F1 by class, averaged under weights that grow more or less with a class's size.

Averages over classes differ in how much a rare class counts: as much as any other (macro), or as much as
its size says (weighted, micro). Between them lie weights that grow more slowly than size. Which average
is reported decides which classifier wins, so the family is shown as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.evaluation._bootstrap import bootstrap
from weightsmith.inspect.evaluation._parts import tensor_of

SCHEMES = ("macro", "dodrans", "entropy", "weighted")
"""Weights by class; ``micro`` is one more average, over examples instead of classes."""

Scheme = str | Callable[[Tensor], Tensor]
"""A word, or a function from counts ``[..., c]`` to weights that need not sum to one."""


@card(
    paper="Harbecke, Chen, Hennig, Alt 2022, 'Why only Micro-F1? Class Weighting of Measures for Relation "
    "Classification'",
    covers=("why-only-micro-f1",),
    unit="model",
)
def class_weights(counts: Any, scheme: Scheme = "dodrans") -> Tensor:
    r"""How much each class counts, from how many examples it has.

    .. math:: w_c \propto 1, \quad n_c^{3/4}, \quad -n_c \log \frac{n_c}{N}, \quad n_c

    for ``macro``, ``dodrans``, ``entropy`` and ``weighted``.

    Args:
        counts: ``[..., c]`` examples of each class.
        scheme: a word of `SCHEMES`, or a function of the counts.

    Returns:
        ``[..., c]`` in float64, of sum one. Where every weight would be 0 (the entropy of a single class), the
        classes that there are share evenly.

    Raises:
        Error: a negative count, no example at all, or an unknown word.

    >>> class_weights([81, 16], "dodrans").tolist() == [27 / 35, 8 / 35]
    True
    """
    found = tensor_of(counts).double()
    if bool((found < 0).any()) or not bool((found.sum(-1) > 0).all()):
        raise Error("class_weights: counts are 0 or more, and not all 0")
    if callable(scheme):
        weights = tensor_of(scheme(found)).double()
    elif scheme == "macro":
        weights = torch.ones_like(found)
    elif scheme == "dodrans":
        weights = found**0.75
    elif scheme == "entropy":
        weights = -torch.xlogy(found, found / found.sum(-1, keepdim=True))
    elif scheme == "weighted":
        weights = found
    else:
        raise Error(f"class_weights knows {', '.join(SCHEMES)}, not {scheme!r}{did_you_mean(scheme, SCHEMES)}")
    total = weights.sum(-1, keepdim=True)
    there = (found > 0).double()
    return torch.where(total > 0, weights / total.clamp(min=1e-300), there / there.sum(-1, keepdim=True))


def _counts(predictions: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, predictions and targets by class, ``[b, c]`` each, of rows ``[b, n]``."""
    rows = torch.arange(len(targets), device=targets.device)[:, None] * (classes + 1)
    hit = torch.where(predictions == targets, targets, classes)  # misses go to a class of their own

    def tally(labels: Tensor) -> Tensor:
        found = torch.bincount((labels + rows).flatten(), minlength=len(targets) * (classes + 1))
        return found.view(len(targets), classes + 1)[:, :classes].double()

    return tally(hit), tally(predictions), tally(targets)


def _checked(predictions: Any, targets: Any, what: str) -> tuple[Tensor, Tensor]:
    said, true = tensor_of(predictions), tensor_of(targets)
    if said.shape != true.shape or not true.ndim or not true.shape[-1]:
        raise Error(
            f"{what}: predictions {list(said.shape)} and targets {list(true.shape)} are not [n] classes of one n"
        )
    if said.is_floating_point() or true.is_floating_point():
        raise Error(f"{what}: classes are whole numbers; give scores their argmax first")
    if int(torch.minimum(said.min(), true.min())) < 0:
        raise Error(f"{what}: classes are 0 or more")
    return said.long(), true.long()


@card(
    paper="Harbecke, Chen, Hennig, Alt 2022, 'Why only Micro-F1? Class Weighting of Measures for Relation "
    "Classification'",
    covers=("why-only-micro-f1",),
    unit="model",
    claim="equals the macro, weighted and micro average at the ends of the family",
)
def weighted_f1(
    predictions: Any,
    targets: Any,
    scheme: Scheme = "dodrans",
    *,
    ignore: Sequence[int] = (),
    classes: int | None = None,
) -> Tensor:
    r"""The F1 of every class, averaged under weights by class size.

    .. math:: \sum_c w_c \frac{2\,TP_c}{2\,TP_c + FP_c + FN_c}

    ``micro`` sums the counts over classes first, which is an average over examples.

    Args:
        predictions, targets: ``[n]`` or ``[b, n]`` classes from 0.
        scheme: a word of `SCHEMES`, ``micro``, or a function as in `class_weights`.
        ignore: classes that are left out, such as "no relation"; confusions with them still count as errors of the
            others. Weights are by the sizes of the classes that are left.
        classes: how many there are; else the highest seen plus one. Only classes seen in predictions or targets
            count.

    Returns:
        A number in float64, or ``[b]``: one for each set of examples, as `bootstrap` wants it; NaN for a set without
        targets of the classes that count.

    Raises:
        Error: shapes that differ, scores in place of classes, or nothing left of the one set of examples.

    >>> weighted_f1(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), "macro").item().__round__(4)
    0.7333
    """
    said, true = _checked(predictions, targets, "weighted_f1")
    shape = true.shape[:-1]
    said, true = said.reshape(-1, said.shape[-1]), true.reshape(-1, true.shape[-1])
    count = classes or int(torch.maximum(said.max(), true.max())) + 1
    if int(torch.maximum(said.max(), true.max())) >= count:
        raise Error(f"weighted_f1: a class beyond the {count} stated")
    hits, given, there = _counts(said, true, count)
    keep = torch.ones(count, dtype=torch.bool, device=true.device)
    keep[[one for one in ignore if 0 <= one < count]] = False
    hits, given, there = hits[:, keep], given[:, keep], there[:, keep]
    if not shape and not bool((given + there).sum()):
        raise Error("weighted_f1: no example of a class that is not ignored")
    if scheme == "micro":
        return (2 * hits.sum(1) / (given + there).sum(1)).reshape(shape)
    by_class = torch.where(given + there > 0, 2 * hits / (given + there).clamp(min=1), 0.0)
    if scheme == "macro":
        seen = (given + there > 0).double()
        return ((by_class * seen).sum(1) / seen.sum(1)).reshape(shape)
    # A resample may hold no target of the classes that count: then the figure is not a number.
    empty = there.sum(1, keepdim=True) == 0
    weights = class_weights(torch.where(empty, torch.ones_like(there), there), scheme)
    return torch.where(empty[:, 0], torch.nan, (by_class * weights).sum(1)).reshape(shape)


@card(
    paper="Harbecke, Chen, Hennig, Alt 2022, 'Why only Micro-F1? Class Weighting of Measures for Relation "
    "Classification'",
    covers=("why-only-micro-f1",),
    unit="model",
    claim="shows classifiers whose order depends on the average",
)
def f1_family(
    predictions: Any,
    targets: Any,
    *,
    ignore: Sequence[int] = (),
    groups: Any = None,
    confidence: float = 0.95,
    samples: int = 500,
    seed: int = 0,
) -> Report:
    """All averages of F1 beside each other, from rare classes that count fully to such that count by size.

    Args:
        predictions, targets: ``[n]`` classes from 0.
        ignore: classes left out, as in `weighted_f1`.
        groups, confidence, samples, seed: as in `bootstrap`.

    Returns:
        Report: a row per average with its interval; F1 by class as a plot.

    Raises:
        Error: as `weighted_f1`.

    >>> f1_family(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), samples=50)["average"]
    ['macro', 'dodrans', 'entropy', 'weighted', 'micro']
    """
    said, true = _checked(predictions, targets, "f1_family")
    if true.ndim != 1:
        raise Error(f"f1_family: one set of examples [n], got {list(true.shape)}")
    count = int(torch.maximum(said.max(), true.max())) + 1
    hits, given, there = (one[0] for one in _counts(said[None], true[None], count))
    kept = [c for c in range(count) if c not in ignore and float(given[c] + there[c])]
    if not any(float(there[c]) for c in kept):
        raise Error("f1_family: no target of a class that is not ignored")
    table, figures = [], {}
    for scheme in (*SCHEMES, "micro"):

        def metric(p: Tensor, t: Tensor, scheme: str = scheme) -> Tensor:
            return weighted_f1(p, t, scheme, ignore=ignore, classes=count)

        found = bootstrap(
            (said, true), metric, groups=groups, confidence=confidence, samples=samples, seed=seed
        )  # fmt: skip
        table.append({"average": scheme, "F1": found.estimate, "low": found.low, "high": found.high})
        figures[scheme] = found.estimate
    by_class = [float(2 * hits[c] / (given[c] + there[c])) for c in kept]
    sizes = [float(there[c]) for c in kept]
    plot = Plot("F1 by class", "examples of the class", "F1", [Line("F1", sizes, by_class, style="points")])
    notes = ["Weights by class size: macro 1, dodrans n^(3/4), entropy -n log(n/N), weighted n; micro over examples."]
    return Report(f"F1 over {len(kept)} classes", figures, table, [plot], notes)
