"""Why an average of models helps: how differently they err, and how near to each other they lie.

The error of an average falls with the number of models as far as their errors are independent
(diversity), and grows with the square of their distance (locality), since only near each other the
average of weights acts as the average of predictions (Ramé et al. 2022, 'Diverse Weight Averaging for
Out-of-Distribution Generalization').
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.inspect._plain import plain
from weightsmith.inspect._report import Line, Plot, Report, Surface
from weightsmith.weights import Inputs, Lazy, Reduction, Stack, Weights, open, same_names, single, solve_all


@dataclass(frozen=True)
class Pair:
    """Two models of several."""

    first: int
    second: int
    disagreement: float
    """Share of examples on which they say different things."""
    both_wrong: float
    """Share of examples that both get wrong."""
    ratio_error: float
    """Examples that only one gets wrong, over those that both do: higher is more diverse. Infinite over none."""


@dataclass(frozen=True)
class Diversity:
    """How differently several classifiers err."""

    accuracies: tuple[float, ...]
    pairs: tuple[Pair, ...]
    any_right: float
    """Share of examples that at least one gets right: what no vote can exceed."""
    ensemble: float | None
    """Accuracy of the mean of the scores, where scores were given."""

    @property
    def ratio_error(self) -> float:
        """The mean over pairs."""
        return sum(pair.ratio_error for pair in self.pairs) / len(self.pairs)

    @property
    def disagreement(self) -> float:
        """The mean over pairs."""
        return sum(pair.disagreement for pair in self.pairs) / len(self.pairs)

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a pair."""
        return [plain(pair) for pair in self.pairs]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        means = {"ratio_error": plain(self.ratio_error), "disagreement": self.disagreement}
        return plain(self) | means

    def report(self) -> Report:
        """Accuracies, a row a pair of models, and how often two of them disagree."""
        indices = [str(index) for index in range(len(self.accuracies))]
        between = {(pair.first, pair.second): pair.disagreement for pair in self.pairs}
        cells = [[between.get((min(i, j), max(i, j)), 0.0) for j in range(len(indices))] for i in range(len(indices))]
        accuracies = Line("accuracy", indices, list(self.accuracies), style="bars")
        return Report(
            "How differently models err",
            figures={
                "models": len(self.accuracies),
                "mean accuracy": sum(self.accuracies) / len(self.accuracies),
                "any right": self.any_right,
                "ensemble": self.ensemble,
                "disagreement": self.disagreement,
                "ratio error": self.ratio_error,
            },
            table=[vars(pair) for pair in self.pairs],
            plots=[
                Plot("Accuracy", "model", "share of right answers", [accuracies]),
                Plot("Disagreement", "model", "model", surface=Surface(indices, indices, cells)),
            ],
        )


def diversity(predictions: Tensor, labels: Tensor) -> Diversity:
    """How differently several classifiers err.

    Args:
        predictions: ``[k, n]`` classes, or ``[k, n, c]`` scores, of k >= 2 models for n examples.
        labels: ``[n]`` true classes.

    Raises:
        ValueError: fewer than two models, no example, or shapes that do not fit.

    >>> labels = torch.tensor([0, 0, 0, 0])
    >>> found = diversity(torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]), labels)
    >>> found.accuracies, found.ratio_error, found.any_right
    ((0.5, 0.5), 2.0, 0.75)
    """
    if predictions.ndim not in (2, 3) or len(predictions) < 2:
        raise Error(
            f"diversity needs predictions [k, n] or [k, n, c] of 2 models or more, got {list(predictions.shape)}"
        )
    if labels.shape != predictions.shape[1:2] or not len(labels):
        raise Error(f"labels {list(labels.shape)} do not fit predictions {list(predictions.shape)}")
    said = predictions.argmax(dim=2) if predictions.ndim == 3 else predictions
    wrong = said != labels
    pairs = []
    for i, j in itertools.combinations(range(len(said)), 2):
        both, one = int((wrong[i] & wrong[j]).sum()), int((wrong[i] ^ wrong[j]).sum())
        ratio = one / both if both else (math.inf if one else 0.0)
        pairs.append(Pair(i, j, _share(said[i] != said[j]), both / len(labels), ratio))
    ensemble = _share(predictions.mean(dim=0).argmax(dim=1) == labels) if predictions.ndim == 3 else None
    return Diversity(tuple(_share(~one) for one in wrong), tuple(pairs), _share(~wrong.all(dim=0)), ensemble)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


@dataclass(frozen=True)
class Flips:
    """What changes between classifiers, as shares of all examples."""

    negative: float
    """The first is right, the second wrong."""
    positive: float
    """The first is wrong, the second right."""


def flips(first: Tensor, second: Tensor, labels: Tensor) -> Flips:
    """Right answers that turn wrong, and wrong ones that turn right, from one classifier to another.

    Args:
        first, second: ``[n]`` classes or ``[n, c]`` scores.
        labels: ``[n]``.

    >>> flips(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 1]), torch.tensor([1, 1, 1]))
    Flips(negative=0.3333333333333333, positive=0.3333333333333333)
    """
    before, after = (_classes(one, labels) == labels for one in (first, second))
    return Flips(_share(before & ~after), _share(~before & after))


def rescued(first: Tensor, second: Tensor, merged: Tensor, labels: Tensor) -> float:
    """The share of examples that two classifiers both get wrong and their merge gets right.

    Where two models rely on different spurious features, their merge can be right although both are
    wrong (Lin et al. 2024, 'Spurious Feature Diversification Improves Out-of-distribution Generalization':
    the FalseFalseTrue ratio).

    Args:
        first, second, merged: ``[n]`` classes or ``[n, c]`` scores.
        labels: ``[n]``.

    >>> rescued(torch.tensor([0, 0]), torch.tensor([2, 1]), torch.tensor([1, 1]), torch.tensor([1, 1]))
    0.5
    """
    one, other, both = (_classes(given, labels) == labels for given in (first, second, merged))
    return _share(~one & ~other & both)


def _classes(given: Tensor, labels: Tensor) -> Tensor:
    said = given.argmax(dim=1) if given.ndim == 2 else given
    if said.shape != labels.shape or not len(labels):
        raise Error(f"labels {list(labels.shape)} do not fit predictions {list(given.shape)}")
    return said


@dataclass(frozen=True)
class Locality:
    """How several checkpoints lie to each other."""

    distances: tuple[float, ...]
    """Of each model from the mean of all."""
    lengths: tuple[float, ...]
    """Of each model's difference from the base (from the mean, without one)."""
    cosines: tuple[tuple[float, ...], ...]
    """Between these differences."""

    @property
    def spread(self) -> float:
        """The largest squared distance from the mean: what the error of an average grows with."""
        return max(self.distances) ** 2

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a model."""
        return [
            {"model": i, "distance": distance, "length": length, "cosines": list(self.cosines[i])}
            for i, (distance, length) in enumerate(zip(self.distances, self.lengths, strict=True))
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return plain(self) | {"spread": self.spread}

    def report(self) -> Report:
        """Distances, lengths, and the cosines between all pairs."""
        indices = [str(index) for index in range(len(self.distances))]
        distances = Line("from the mean", indices, list(self.distances), style="bars")
        lengths = Line("from the base", indices, list(self.lengths), style="bars")
        lines = [distances] if self.lengths == self.distances else [distances, lengths]
        count = len(indices)
        pairs = [self.cosines[i][j] for i in range(count) for j in range(i)]
        return Report(
            "How near models lie to each other",
            figures={"models": count, "spread": self.spread, "mean cosine": sum(pairs) / len(pairs)},
            table=[
                {"model": i, "distance": distance, "length": self.lengths[i], "cosines": list(self.cosines[i])}
                for i, distance in enumerate(self.distances)
            ],
            plots=[
                Plot("Distances", "model", "distance", lines),
                Plot("Cosines of differences", "model", "model", surface=Surface(indices, indices, self.cosines)),
            ],
        )


def locality(models: Sequence[Any], base: Any = None, threads: int | None = None) -> Locality:
    """How near checkpoints are to each other, from one pass over all of them.

    Args:
        models: k >= 2 checkpoints of one architecture; anything that `weightsmith.open` opens.
        base: the checkpoint that they were all started from.
        threads: workers; default one a core.

    Raises:
        ValueError: fewer than two models, or ones of different tensors.

    >>> found = locality([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}], {"w": torch.zeros(2)})
    >>> found.cosines[0], round(found.spread, 6)
    ((1.0, 0.0), 0.5)
    """
    if len(models) < 2:
        raise Error(f"locality needs at least 2 models, got {len(models)}")
    opened = [open(model) for model in models]
    origin = None if base is None else open(base)
    gram = _gram(opened, origin, threads)
    middle = torch.full((len(opened),), 1 / len(opened), dtype=torch.float64)
    centred = torch.eye(len(opened), dtype=torch.float64) - middle
    around = centred @ gram @ centred.T
    deltas = around if origin is None else gram
    lengths = deltas.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(lengths, lengths)
    cosines = torch.where(scale > 0, deltas / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0).clamp(-1, 1)
    return Locality(
        tuple(around.diagonal().clamp(min=0).sqrt().tolist()),
        tuple(lengths.tolist()),
        tuple(tuple(row) for row in cosines.tolist()),
    )


def _gram(models: Sequence[Weights], base: Weights | None, threads: int | None) -> Tensor:
    """Inner products of all float tensors together, ``[k, k]`` in float64; of the differences from a reference.

    The reference is the base, or else the first model: distances between models do not depend on it, and sums
    of small differences round less than those of large values.
    """
    origin = models[0] if base is None else base
    floating = models[0].select(floating=True)
    for other in [*models, origin]:
        same_names(models[0], other, "locality needs models of the same tensors")
    ties = floating.ties
    items = []
    for name in floating:
        members: list[Lazy] = [model.node(name) for model in models]
        if name not in ties:
            try:
                items.append(Inputs([Stack(tuple(members)), origin.node(name)], "element"))
            except Error as error:
                raise Error(f"tensor {name}: {error}") from None
    reductions = [Reduction([item], functools.partial(single, _inner, _same)) for item in items]
    solve_all(reductions, threads)
    return sum((one.value() for one in reductions), torch.zeros(len(models), len(models), dtype=torch.float64))


def _inner(models: Tensor, base: Tensor) -> Tensor:
    deltas = (models - base).reshape(len(models), -1)
    return (deltas @ deltas.T).double()


def _same(gram: Tensor) -> Tensor:
    return gram
