"""How sure a figure is: the same figure on many resamples of the examples.

Examples drawn again with replacement stand for another test set of the same size. Where examples belong
together (sequences of one document, several prompts of one task) whole groups are drawn; where two
models saw the same examples, both are measured on the same draw, so that what is hard for both cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.inspect._report import Report
from weightsmith.inspect.evaluation._parts import Interval, alike, normal_quantile, numbers, share, tensor_of
from weightsmith.solve import draws, grouped, resampled_means

KINDS = ("percentile", "basic", "bca")
BLOCKS = 500  # of the jackknife behind "bca" for a metric of your own: more examples are left out in blocks

Metric = Callable[..., Tensor]
"""``(*[b, n, ...]) -> [b]``: a figure of each of b sets of examples."""


@card(
    paper="Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'; "
    "Efron 1987, 'Better Bootstrap Confidence Intervals'",
    covers=("model-evaluation-model-selection",),
    unit="model",
    claim="its intervals hold the true figure as often as they say, skewed figures included (bca)",
)
def bootstrap(
    values: Any,
    metric: Metric | None = None,
    *,
    method: str = "percentile",
    groups: Any = None,
    weight: Any = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    r"""The interval of a figure over examples.

    With :math:`\theta_b` the figure on resample b and :math:`q` their quantiles, :math:`\alpha = 1 - confidence`:

    .. math:: [q_{\alpha/2}, q_{1-\alpha/2}], \qquad [2\theta - q_{1-\alpha/2},\; 2\theta - q_{\alpha/2}],
        \qquad [q_{a(\alpha/2)}, q_{a(1-\alpha/2)}], \quad
        a(p) = \Phi\Big(z + \frac{z + \Phi^{-1}(p)}{1 - c\,(z + \Phi^{-1}(p))}\Big)

    for ``percentile``, ``basic`` and ``bca``, with :math:`z` the bias of the median and :math:`c` the acceleration.

    Args:
        values: ``[n]``, a number per example; or a tuple of tensors ``[n, ...]`` for ``metric``: predictions, targets.
        metric: resamples ``[b, n, ...]``, one argument per tensor, to figures ``[b]``; None is the mean. It may be
            given any number of examples.
        groups: ``[n]``: examples of one group are drawn together.
        weight: ``[n]``, of the mean: how much an example counts, such as its tokens. Not with a metric.
        method, confidence: of the interval.
        samples: resamples.
        seed: of the resamples.

    Returns:
        Interval: with the standard error over the resamples.

    Raises:
        Error: nothing to draw from, values that are not finite, an unknown method, a metric that never gives a number.

    >>> found = bootstrap(torch.arange(100.0))
    >>> found.estimate, 41 < found.low < 46, 53 < found.high < 58
    (49.5, True, True)
    """
    if method not in KINDS:
        raise Error(f"bootstrap knows {', '.join(KINDS)}, not {method!r}{did_you_mean(method, KINDS)}")
    share(confidence, "confidence")
    if samples < 2:
        raise Error(f"bootstrap needs 2 samples or more, got {samples}")
    if metric is None:
        found = _Mean(numbers(values, "bootstrap"), groups, weight)
    else:
        if weight is not None:
            raise Error("bootstrap: weight belongs to the mean; give a metric its weights as one more tensor")
        found = _Figure(values, metric, groups)
    figures = found.resampled(samples, seed)
    kept = figures[figures.isfinite()]
    estimate = found.estimate()
    if not len(kept) or not math.isfinite(estimate):
        where = "any resample" if not len(kept) else "the examples themselves"
        raise Error(f"bootstrap: the metric gave no finite number on {where}")
    low, high = _ends(kept, estimate, confidence, method, found.without)
    error = float(kept.std()) if len(kept) > 1 else 0.0
    return Interval(estimate, low, high, confidence, method, error, found.count, samples - len(kept))


@card(
    paper="Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'",
    covers=("model-evaluation-model-selection",),
    unit="model",
)
def paired_interval(first: Any, second: Any, **options: Any) -> Interval:
    r"""The interval of the mean difference, first minus second, of two models over the same examples.

    Args:
        first, second: ``[n]``, a number per example each; differences below 0 favour the first where less is better.
        options: of `bootstrap`; ``weight=`` tokens per sequence and ``groups=`` their documents, for instance.

    Returns:
        Interval: ``found.map(math.exp)`` makes one of log-likelihoods per token one of the ratio of perplexities.

    Raises:
        Error: as `bootstrap`, or different numbers of examples.

    >>> hard = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 100       # the same for both
    >>> paired_interval(hard + 1, hard, samples=50).low > 0.99
    True
    """
    one, other = numbers(first, "paired_interval: first"), numbers(second, "paired_interval: second")
    alike(one, other, "paired_interval")
    return bootstrap(one - other, **options)


class _Mean:
    """A weighted mean of numbers."""

    def __init__(self, values: Tensor, groups: Any, weight: Any):
        self.values, self.groups = values, groups
        self.weight = torch.ones_like(values) if weight is None else numbers(weight, "bootstrap: weight").to(values)
        alike(values, self.weight, "bootstrap: values and weight")
        if bool((self.weight < 0).any()) or not float(self.weight.sum()) > 0:
            raise Error("bootstrap: weights are 0 or more, and not all 0")
        self.number, self.count = grouped(groups, len(values))

    def estimate(self) -> float:
        return float((self.values * self.weight).sum() / self.weight.sum())

    def resampled(self, samples: int, seed: int) -> Tensor:
        return resampled_means(self.values[None], samples, seed, self.groups, self.weight)[:, 0]

    def without(self) -> Tensor:
        """The mean without each group."""
        number = self.number.to(self.values.device)
        sums = self.values.new_zeros(self.count).index_add_(0, number, self.values * self.weight)
        sizes = self.values.new_zeros(self.count).index_add_(0, number, self.weight)
        return (sums.sum() - sums) / (sizes.sum() - sizes)


class _Figure:
    """Any metric of tensors that share their first axis."""

    def __init__(self, values: Any, metric: Metric, groups: Any):
        several = isinstance(values, tuple | list) and not (values and isinstance(values[0], int | float))
        given = values if several else (values,)
        self.tensors = [tensor_of(one) for one in given]
        self.metric = metric
        counts = {len(one) if one.ndim else 0 for one in self.tensors}
        if len(counts) != 1 or 0 in counts:
            raise Error(
                f"bootstrap: tensors of as many examples are needed, got {[list(t.shape) for t in self.tensors]}"
            )
        self.examples = counts.pop()
        self.number, self.count = grouped(groups, self.examples)
        self.members = None if groups is None else [torch.where(self.number == i)[0] for i in range(self.count)]

    def estimate(self) -> float:
        return float(self._of(torch.arange(self.examples)[None])[0])

    def _of(self, chosen: Tensor) -> Tensor:
        found = self.metric(*(one[chosen.to(one.device)] for one in self.tensors))
        if found.shape != chosen.shape[:1]:
            raise Error(f"bootstrap: a metric of [b, n, ...] gives [b], here [{len(chosen)}], not {list(found.shape)}")
        return found.detach().double().cpu()

    def _drawn(self, chunk: Tensor) -> Tensor:
        if self.members is None:
            return self._of(chunk)
        # Groups differ in size, so resamples differ in length: one at a time.
        return torch.cat([self._of(torch.cat([self.members[i] for i in row.tolist()])[None]) for row in chunk])

    def resampled(self, samples: int, seed: int) -> Tensor:
        width = max(one[0].numel() for one in self.tensors) * max(self.examples // self.count, 1)
        return torch.cat([self._drawn(chunk) for chunk in draws(self.count, samples, seed, width)])

    def without(self) -> Tensor:
        """The figure without each group, or without blocks of them where there are very many."""
        if self.count == 1:
            return torch.zeros(0, dtype=torch.float64)
        blocks = torch.arange(self.count) * min(self.count, BLOCKS) // self.count
        block = blocks[self.number]
        everything = torch.arange(self.examples)
        return torch.cat([self._of(everything[block != i][None]) for i in range(int(blocks[-1]) + 1)])


def _ends(
    figures: Tensor, estimate: float, confidence: float, method: str, without: Callable[[], Tensor]
) -> tuple[float, float]:
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    if method == "bca":
        tails = _corrected(figures, estimate, tails, without())
    low, high = torch.quantile(figures, figures.new_tensor(tails)).tolist()
    return (2 * estimate - high, 2 * estimate - low) if method == "basic" else (low, high)


def _corrected(figures: Tensor, estimate: float, tails: list[float], without: Tensor) -> list[float]:
    """The tails of a bca interval, corrected for the bias of the median and for a spread that grows with the figure."""
    below = float(((figures < estimate).double() + (figures <= estimate).double()).mean() / 2)
    edge = 1 / (len(figures) + 1)
    bias = normal_quantile(min(max(below, edge), 1 - edge))
    without = without[without.isfinite()]
    around = without.mean() - without
    spread = float(around.square().sum())
    acceleration = float(around.pow(3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    shifted = [bias + normal_quantile(tail) for tail in tails]
    normal = torch.tensor([bias + one / (1 - acceleration * one) for one in shifted], dtype=torch.float64)
    return torch.special.ndtr(normal).tolist()


Predict = Callable[[Tensor], Tensor]
"""``indices [m]`` to train on, some repeated ``-> predictions [n, ...]`` for all examples."""


def wrong(predictions: Tensor, targets: Tensor) -> Tensor:
    """1 where a prediction is not the target: the default loss.

    >>> wrong(torch.tensor([1, 0]), torch.tensor([1, 1])).tolist()
    [0.0, 1.0]
    """
    return (predictions != targets).double()


@card(
    paper="Efron, Tibshirani 1997, 'Improvements on Cross-Validation: The .632+ Bootstrap Method'; "
    "Raschka 2018, 'Model Evaluation, Model Selection, and Algorithm Selection in Machine Learning'",
    covers=("model-evaluation-model-selection",),
    unit="model",
    claim="nearer to the true error of a training procedure than its training error or the out-of-bag error",
)
def bootstrap_632(
    predict: Predict,
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = wrong,
    samples: int = 50,
    seed: int = 0,
) -> Report:
    r"""The error of a training procedure, from retraining it on resamples of few examples.

    .. math:: w = \frac{0.632}{1 - 0.368 R}, \quad R = \frac{E_1 - E_0}{\gamma - E_0}, \quad
        E_{.632+} = (1 - w) E_0 + w \min(E_1, \gamma)

    with :math:`E_0` the error on what was trained on, :math:`E_1` that of examples left out of their resample,
    averaged by example, and :math:`\gamma` the error if predictions had nothing to do with targets.

    Args:
        predict: trains on the examples it is given, some of them several times, and predicts all of them.
        targets: ``[n]``.
        loss: ``(predictions [m, ...], targets [m]) -> [m]``.
        samples: how often it is trained, once more on all examples.
        seed: of the resamples.

    Returns:
        Report: ``training``, ``out of bag``, ``.632``, ``.632+``, ``no information`` and ``overfitting`` (R).

    Raises:
        Error: fewer than two examples, or no example that was ever left out.

    >>> labels = torch.tensor([0, 1] * 20)
    >>> found = bootstrap_632(lambda chosen: torch.zeros(40, dtype=torch.long), labels, samples=20)   # learns nothing
    >>> round(found[".632+"], 2)
    0.5
    """
    count = len(targets)
    if count < 2:
        raise Error(f"bootstrap_632 needs 2 examples or more, got {count}")
    whole = predict(torch.arange(count))
    training = float(loss(whole, targets).double().mean())
    # Every prediction against every target, equal targets at once.
    kinds, sizes = torch.unique(targets, return_counts=True)
    none = sum(float(loss(whole, kind.expand(count)).double().mean()) * size for kind, size in
               zip(kinds, sizes.tolist(), strict=True)) / count  # fmt: skip
    total, times = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for chunk in draws(count, samples, seed):
        for chosen in chunk:
            left = torch.ones(count, dtype=torch.bool)
            left[chosen] = False
            places = torch.where(left)[0]
            losses = loss(predict(chosen)[places], targets[places]).double().cpu()
            total[places] += losses
            times[places] += 1
    if not bool(times.any()):
        raise Error(f"bootstrap_632: no example was left out of any of {samples} resamples; take more")
    left_out = float((total[times > 0] / times[times > 0]).mean())
    # The relative overfitting makes sense only between the training error and that of no information.
    bounded = min(left_out, none)
    overfitting = (bounded - training) / (none - training) if training < bounded and training < none else 0.0
    plus = 0.632 / (1 - 0.368 * overfitting)
    figures = {
        "training": training,
        "out of bag": left_out,
        ".632": 0.368 * training + 0.632 * left_out,
        ".632+": (1 - plus) * training + plus * bounded,
        "no information": none,
        "overfitting": overfitting,
    }
    unseen = int((times == 0).sum())
    notes = [f"{unseen} of {count} examples were in every resample and say nothing."] if unseen else []
    return Report("error of a training procedure, by the bootstrap", figures, notes=notes)
