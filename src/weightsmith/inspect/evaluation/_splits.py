"""Which examples to train on and which to test on, again and again.

Every example is tested on once a round. Groups stay together, so that nothing of a test example was
seen in training; classes can be spread evenly over the folds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.solve import grouped


class Split(NamedTuple):
    """Indices of examples."""

    training: Tensor
    test: Tensor


class Nested(NamedTuple):
    """A split, and splits of its training part to choose options by."""

    training: Tensor
    test: Tensor
    inner: list[Split]


@card(
    paper="Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'",
    covers=("model-evaluation-model-selection",),
    unit="model",
)
def folds(
    count: int, k: int = 5, *, repeats: int = 1, labels: Any = None, groups: Any = None, seed: int = 0
) -> Iterator[Split]:
    """Splits of repeated k-fold cross-validation; ``k=2, repeats=5`` is what `five_by_two` wants.

    Args:
        count: n examples.
        k: folds a round.
        repeats: rounds, each shuffled anew.
        labels: ``[n]``: every fold has its share of each.
        groups: ``[n]``: examples of a group are in one fold. Not together with labels.
        seed: of the shuffling.

    Returns:
        ``k * repeats`` pairs of index tensors, round by round.

    Raises:
        Error: more folds than examples or groups, or both labels and groups.

    >>> [split.test.tolist() for split in folds(4, 2)]
    [[0, 1], [3, 2]]
    """
    if labels is not None and groups is not None:
        raise Error("folds: labels or groups, not both")
    number, total = grouped(groups, count)
    if not 2 <= k <= total or repeats < 1:
        raise Error(f"folds: {total} examples or groups make 2 to {total} folds, got k={k}, repeats={repeats}")
    kinds = None if labels is None else grouped(labels, count)[0]
    return _folds(number, total, kinds, k, repeats, seed)


def _folds(number: Tensor, total: int, kinds: Tensor | None, k: int, repeats: int, seed: int) -> Iterator[Split]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(repeats):
        order = torch.randperm(total, generator=generator)
        if kinds is not None:
            order = order[kinds[order].argsort(stable=True)]  # dealt out in turn, class by class
            fold_of = torch.empty(total, dtype=torch.long)
            fold_of[order] = torch.arange(total) % k
        else:
            fold_of = torch.empty(total, dtype=torch.long)
            fold_of[order] = torch.arange(total) * k // total
        place = torch.empty(total, dtype=torch.long)
        place[order] = torch.arange(total)
        shuffled = place[number].argsort(stable=True)
        member = fold_of[number][shuffled]
        for fold in range(k):
            yield Split(shuffled[member != fold], shuffled[member == fold])


@card(
    paper="Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'",
    covers=("model-evaluation-model-selection",),
    unit="model",
)
def nested_folds(count: int, outer: int = 5, inner: int = 5, *, seed: int = 0, **options: Any) -> Iterator[Nested]:
    """Splits for choosing and judging at once: options are chosen on the inner splits, judged on the outer test part.

    Args:
        count: n examples.
        outer, inner: folds of either kind.
        seed: of the outer splits; the inner ones count on from it.
        options: of `folds`; ``repeats`` are those of the outer splits.

    Returns:
        One for every outer split.

    Raises:
        Error: as `folds`, for either kind; that of the inner ones comes with the first split.

    >>> next(nested_folds(6, 3, 2)).inner[0].test.shape
    torch.Size([2])
    """
    given = [name for name in ("labels", "groups") if options.get(name) is not None]
    described: dict[str, Any] = {name: grouped(options.pop(name), count)[0] for name in given}
    for index, split in enumerate(folds(count, outer, seed=seed, **described, **options)):
        chosen = {name: value[split.training] for name, value in described.items()}
        within = folds(len(split.training), inner, seed=seed + 1 + index, **chosen)
        found = [Split(split.training[one.training], split.training[one.test]) for one in within]
        yield Nested(split.training, split.test, found)
