"""A classifier on frozen features, without training: one Gaussian a class, all with the same variances.

A head that models the features needs far fewer examples than one that only separates the classes, and ends at a
higher error: with few labels the first is better, with many the second. Both are linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report


@card(
    paper="Zheng, Chen, Wu, Li, Zhu 2023, 'Revisiting Discriminative vs. Generative Classifiers: Theory and "
    "Implications'",
    covers=("revisiting-discriminative-vs-generative",),
    needs=("data",),
    unit="model",
    claim="with few examples a class it is more often right than logistic regression",
)
def naive_bayes_head(
    features: Tensor, labels: Tensor, *, classes: int | None = None, smoothing: float = 1e-3
) -> nn.Linear:
    r"""Gaussian naive Bayes with variances that all classes share, as a linear layer.

    .. math:: w_k = \Sigma^{-1}\mu_k, \qquad b_k = \log\pi_k - \tfrac12\, \mu_k^\top \Sigma^{-1} \mu_k

    with :math:`\mu_k` a class's mean, :math:`\pi_k` its share and :math:`\Sigma` the diagonal of variances within
    classes. The softmax of its outputs is the posterior.

    Args:
        features: ``[n, d]``.
        labels: ``[n]`` whole numbers from 0.
        classes: c; by default as many as there are labels. A class without examples has mean 0 and the bias of half an
            example's share.
        smoothing: added to the variances, as a share of their largest (all variances 0: of the largest over all
            examples).

    Returns:
        nn.Linear: ``d -> c``, in the dtype of the features; computed in float64.

    Raises:
        Error: shapes that do not fit, no example, labels out of range, features that are not finite or never vary.

    >>> features = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> head = naive_bayes_head(features, torch.tensor([0, 0, 1, 1]))
    >>> head(torch.tensor([[2.4], [2.6]])).argmax(dim=1).tolist()
    [0, 1]
    """
    values, marks, count = _checked(features, labels, classes)
    if not smoothing >= 0:
        raise Error(f"smoothing= is at least 0, got {smoothing}")
    sizes = torch.bincount(marks, minlength=count).double()
    means = values.new_zeros(count, values.shape[1]).index_add_(0, marks, values) / sizes.clamp(min=1)[:, None]
    variance = (values - means[marks]).square().mean(dim=0)
    largest = variance.max()
    if not largest > 0:  # one example a class: the spread between them is all there is
        largest = variance = (values - values.mean(dim=0)).square().mean(dim=0)
        largest = variance.max()
    if not largest > 0:
        raise Error("the features are the same for every example: no class can be told from another")
    spread = variance + smoothing * largest
    if not bool((spread > 0).all()):
        raise Error(
            f"{int((spread <= 0).sum())} features never vary within a class: leave them out, or smoothing= above 0"
        )
    precision = 1 / spread
    share = sizes.clamp(min=0.5) / len(marks)
    return _head(means * precision, share.log() - (means.square() * precision).sum(dim=1) / 2, features)


def _checked(features: Tensor, labels: Tensor, classes: int | None) -> tuple[Tensor, Tensor, int]:
    """Features in float64, labels beside them, and how many classes there are."""
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise Error(f"features [n, d] and labels [n] do not fit: {list(features.shape)}, {list(labels.shape)}")
    marks = labels.to(features.device).long()
    count = int(marks.max()) + 1 if classes is None else classes
    if int(marks.min()) < 0 or int(marks.max()) >= count:
        raise Error(f"labels are from 0 to {count - 1}, got {int(marks.min())} to {int(marks.max())}")
    if not bool(torch.isfinite(features).all()):
        raise Error("the features are not all finite numbers")
    return features.detach().double(), marks, count


def _head(weight: Tensor, bias: Tensor, like: Tensor) -> nn.Linear:
    """A linear layer with these weights, in the dtype of ``like``; the global generator is not asked."""
    head = nn.Linear(weight.shape[1], weight.shape[0], dtype=like.dtype, device="meta").to_empty(device=like.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


@card(
    paper="Cox 1958, 'The Regression Analysis of Binary Sequences'; Bishop 2006, 'Pattern Recognition and Machine "
    "Learning'",
    needs=("data",),
    unit="model",
    claim="ends at the one optimum, from any start",
)
def logistic_head(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    decay: float = 1e-3,
    start: nn.Linear | None = None,
    steps: int = 200,
) -> nn.Linear:
    r"""Multinomial logistic regression.

    .. math:: \min_{W, b} \frac1n \sum_i -\log p(y_i \mid x_i) + \frac{\text{decay}}{2} \|W\|^2

    Args:
        features: ``[n, d]``; best of unit variance.
        labels: ``[n]``.
        classes: c; by default as many as there are labels.
        decay: of the weights, not of biases.
        start: a head to begin from, such as `naive_bayes_head`; 0 by default.
        steps: of L-BFGS, at most.

    Returns:
        nn.Linear: ``d -> c``, in the dtype of the features; computed in float64. At the optimum where ``steps``
        suffice.

    Raises:
        Error: shapes that do not fit, no example, labels out of range, features that are not finite, a start of
            another shape.

    >>> head = logistic_head(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    >>> head(torch.tensor([[-0.5], [0.5]])).argmax(dim=1).tolist()
    [0, 1]
    """
    values, marks, count = _checked(features, labels, classes)
    if not decay >= 0 or steps < 1:
        raise Error(f"needs a decay of at least 0 and at least 1 step, got {decay} and {steps}")
    shape = (count, values.shape[1])
    if start is not None and (start.weight.shape != shape or start.bias is None):
        raise Error(f"start= is a layer of {shape[1]} features and {shape[0]} classes with biases, got {start}")
    weight = torch.zeros(count, values.shape[1], dtype=torch.float64, device=values.device)
    bias = torch.zeros(count, dtype=torch.float64, device=values.device)
    if start is not None:
        weight, bias = (one.detach().to(values, copy=True) for one in (start.weight, start.bias))
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(values @ weight.T + bias, marks) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return _head(weight, bias, features)


@card(
    paper="Zheng, Chen, Wu, Li, Zhu 2023, 'Revisiting Discriminative vs. Generative Classifiers: Theory and "
    "Implications'; Ng, Jordan 2001, 'On Discriminative vs. Generative Classifiers'",
    covers=("revisiting-discriminative-vs-generative",),
    needs=("data",),
    unit="model",
    claim="finds the number of labels from which training a head pays",
)
def head_curves(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int] = (1, 2, 3, 5, 10, 20, 50, 100),
    draws: int = 5,
    smoothing: float = 1e-3,
    decay: float = 1e-3,
    seed: int = 0,
) -> Report:
    """Accuracies of the naive Bayes head and of logistic regression by the number of labels, and where they cross.

    Args:
        features, labels: ``[n, d]`` and ``[n]``, to draw training examples from. They are standardised with the mean
            and variance of all of them, which needs no labels.
        test_features, test_labels: to measure accuracies on.
        shots: examples of each class; sizes that a class does not have are left out.
        draws: for each size.
        smoothing: of the naive Bayes head.
        decay: of the logistic one.
        seed: of the draws.

    Returns:
        Report: a row for every size with both mean accuracies and their standard deviations over draws.
        ``crossing`` is the fewest examples a class from which on logistic regression is at least as good; None where
        it never is.

    Raises:
        Error: shapes that do not fit, or classes with fewer examples than the smallest of ``shots``.

    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(400) % 2
    >>> features = torch.randn(400, 20, generator=generator) + labels[:, None]
    >>> found = head_curves(features[:200], labels[:200], features[200:], labels[200:], shots=(2, 50), draws=2)
    >>> found["naive bayes"][0] > 0.7
    True
    """
    whole, marks, classes = _checked(features, labels, None)
    marks = marks.cpu()
    if (
        not len(test_labels)
        or test_features.shape[1:] != features.shape[1:]
        or test_labels.shape != test_features.shape[:1]
    ):
        raise Error(f"test features {list(test_features.shape)} and labels {list(test_labels.shape)} do not fit")
    fewest = int(torch.bincount(marks, minlength=classes).min())
    sizes = sorted({shot for shot in shots if 1 <= shot <= fewest})
    if not sizes or draws < 1:
        raise Error(
            f"shots= needs a size of at most {fewest}, the examples of the smallest class, and draws= at least 1"
        )
    centre, spread = whole.mean(dim=0), whole.std(dim=0)
    spread = torch.where(spread > 0, spread, 1.0)
    values, asked = (whole - centre) / spread, (test_features.detach().to(whole) - centre) / spread
    expected = test_labels.to(asked.device)
    generator = torch.Generator().manual_seed(seed)

    def right(head: nn.Linear) -> float:
        with torch.no_grad():
            return float((head(asked).argmax(dim=1) == expected).double().mean())

    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for _ in range(draws):
        order = torch.randperm(len(marks), generator=generator)
        for size in sizes:  # the smaller sets are parts of the larger
            chosen = torch.cat([order[marks[order] == k][:size] for k in range(classes)]).to(values.device)
            part = values[chosen], labels[chosen.to(labels.device)]
            generative = naive_bayes_head(*part, classes=classes, smoothing=smoothing)
            found[size].append((right(generative), right(logistic_head(*part, classes=classes, decay=decay))))
    rows = []
    for size in sizes:
        scores = torch.tensor(found[size], dtype=torch.float64)
        mean, deviation = scores.mean(dim=0), scores.std(dim=0, correction=0)
        rows.append({"shots": size, "naive bayes": float(mean[0]), "logistic": float(mean[1]),
                     "naive bayes, deviation": float(deviation[0]),
                     "logistic, deviation": float(deviation[1])})  # fmt: skip
    behind = [row["shots"] for row in rows if row["logistic"] < row["naive bayes"]]
    after = [size for size in sizes if size > max(behind, default=0)]
    figures = {"crossing": min(after, default=None), "features": features.shape[1], "classes": classes, "draws": draws}
    lines = [Line(what, sizes, [row[what] for row in rows]) for what in ("naive bayes", "logistic")]
    plots = (Plot("Accuracy by labels", "examples a class", "accuracy", lines, log="x"),)
    return Report("Generative and discriminative heads", figures, rows, plots)
