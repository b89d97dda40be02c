"""Which training examples an answer is due to.

Were the model linear in its weights, taking one example out of the training data would move each answer by an inner
product of two gradients, seen through the inverse of all gradients' second moments. TRAK takes the network for linear
around its end point, squeezes gradients into a few random numbers and averages over several end points. D-TRAK uses
the gradient of another output than the one that was trained, which theory does not ask for; its authors measured that
it ranks better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._parts import ranked
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.attribution._parts import correlation, interval_of_mean
from weightsmith.stats import example_gradients, fitted
from weightsmith.stats.room import Batch, Loss, default_forward, restored
from weightsmith.weights import Pattern, working


@card(
    paper="Park, Georgiev, Ilyas, Leclerc, Madry 2023, 'TRAK: Attributing Model Behavior at Scale'; Zheng, Pang, Du, "
    "Jiang, Lin 2024, 'Intriguing Properties of Data Attribution on Diffusion Models'",
    covers=("intriguing-properties-data-attribution",),
    unit="model",
    claim="for ridge regression it gives the effect of leaving one example out exactly",
    departs="damping is relative to the mean eigenvalue, so that it does not depend on the scale of the gradients",
)
def kernel_scores(
    training: Tensor,
    queries: Tensor,
    *,
    damping: float = 0.3,
    residuals: Tensor | None = None,
    leave_one_out: bool = False,
) -> Tensor:
    r"""What each training example adds to each query's output, by the features of both.

    .. math:: \tau = \Phi_q \bigl(\Phi^\top \Phi + \lambda I\bigr)^{-1} \Phi^\top Q, \qquad
        \lambda = \text{damping} \cdot \operatorname{tr}(\Phi^\top \Phi) / d

    Args:
        training: ``[n, d]`` features :math:`\Phi`, such as projected gradients.
        queries: ``[m, d]`` features of the same kind.
        damping: see above; 0 takes the pseudo-inverse. The default ranked well for three small classifiers and two
            small denoisers, each of 200 examples.
        residuals: ``[n]``, the diagonal of Q: how far each example's output is from its target; None for ones.
        leave_one_out: divide by one less the example's leverage: exact for ridge regression, where the others are
            fitted anew without the example.

    Returns:
        ``[m, n]`` float64.

    Raises:
        ValueError: features or residuals that do not fit, features that are not finite, no example, a damping below 0,
            leave-one-out where an example has leverage 1.

    >>> kernel_scores(torch.eye(2), torch.tensor([[1.0, 2.0]]), damping=0.0)
    tensor([[1., 2.]], dtype=torch.float64)
    """
    if training.dim() != 2 or queries.dim() != 2 or training.shape[1] != queries.shape[1] or not training.numel():
        raise Error(f"features are [n, d] and [m, d]; got {list(training.shape)} and {list(queries.shape)}")
    if residuals is not None and residuals.shape != training.shape[:1]:
        raise Error(f"residuals are [n], one for each of {len(training)} examples; got {list(residuals.shape)}")
    if not damping >= 0:
        raise Error(f"damping is at least 0, got {damping}")
    features, asked = training.double(), queries.double()
    if not (features.isfinite().all() and asked.isfinite().all()):
        raise Error("the features hold values that are not finite")
    # The thin decomposition serves many dimensions and few examples as well as few and many.
    left, sizes, right = torch.linalg.svd(features, full_matrices=False)
    penalty = damping * float(sizes.square().sum()) / features.shape[1]
    kept = sizes > sizes.max() * max(features.shape) * torch.finfo(sizes.dtype).eps
    inverse = torch.where(kept, sizes / (sizes.square() + penalty).clamp(min=torch.finfo(sizes.dtype).tiny), 0.0)
    scores = (asked @ right.T * inverse) @ left.T
    if leave_one_out:
        leverage = (left.square() * (sizes * inverse)).sum(dim=1)
        alone = 1 - leverage <= max(features.shape) * torch.finfo(leverage.dtype).eps
        if alone.any():
            raise Error(
                f"leave_one_out: example {int(alone.nonzero()[0])} alone decides what is said of it (leverage 1); "
                "take a damping above 0"
            )
        scores = scores / (1 - leverage)
    return scores if residuals is None else scores * residuals.double()


@card(
    paper="Park, Georgiev, Ilyas, Leclerc, Madry 2023, 'TRAK: Attributing Model Behavior at Scale'",
    covers=("intriguing-properties-data-attribution",),
    needs=("data",),
    unit="model",
    claim="its sums over subsets rank the outputs of networks trained on them; how well depends on the damping",
    departs="damped; without damping small networks ranked far worse",
)
def trak(
    model: nn.Module,
    training: Iterable[Batch],
    queries: Iterable[Batch],
    *,
    checkpoints: Sequence[Any] | None = None,
    dim: int = 1024,
    damping: float = 0.3,
    seed: int = 0,
    pattern: Pattern = "*",
    at_once: int = 64,
) -> Tensor:
    r"""What each training example adds to the margin of each query: TRAK, for classifiers.

    .. math:: f = \log \frac{p_y}{1 - p_y}, \quad \phi = P^\top \nabla_\theta f, \quad
        \tau = \Bigl(\tfrac1k \sum_c \Phi_q (\Phi^\top \Phi + \lambda I)^{-1} \Phi^\top\Bigr)
        \Bigl(\tfrac1k \sum_c \operatorname{diag}(1 - p_y)\Bigr)

    Args:
        model: a classifier, left as it was.
        training: batches ``(inputs, labels)``; gone through twice for every checkpoint.
        queries: batches of the same kind: the labels say which margin is meant.
        checkpoints: end points c of several runs (on halves of the data, say); anything that `weightsmith.open`
            opens. None for the model's own weights.
        dim: numbers that a gradient is squeezed into; near the number of examples.
        damping: see `kernel_scores`; worth a search. For small classifiers 0.01 ranked worse than cosines of gradients
            do, 0.3 to 3 at least as well.
        seed: of the projections; every checkpoint has its own.
        pattern: names of the parameters whose gradients count.
        at_once: examples whose exact gradients are held together.

    Returns:
        ``[queries, training examples]`` float64; above 0 where the example speaks for the query's label.

    Raises:
        ValueError: no example, or batches that are not ``(inputs, labels)``.

    >>> net = torch.nn.Linear(2, 2)
    >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))]
    >>> scores = trak(net, data, data, dim=64)
    >>> bool(scores[0, 0] > 0), bool(scores[1, 1] > 0)
    (True, True)
    """
    seen, asked = list(training), list(queries)
    kernels, residuals = [], []
    for index, checkpoint in enumerate(checkpoints if checkpoints is not None else [None]):
        settings: dict[str, Any] = {"dim": dim, "seed": seed + index, "pattern": pattern, "at_once": at_once}
        settings |= {"weights": checkpoint, "loss": margin}
        features, wanted = (example_gradients(model, data, **settings) for data in (seen, asked))
        kernels.append(kernel_scores(features, wanted, damping=damping))
        residuals.append(_residuals(model, seen, checkpoint))
    if not kernels:
        raise Error("trak needs at least 1 checkpoint, got 0")
    return sum(kernels[1:], kernels[0]) / len(kernels) * (sum(residuals[1:], residuals[0]) / len(residuals))


@card(
    paper="Zheng, Pang, Du, Jiang, Lin 2024, 'Intriguing Properties of Data Attribution on Diffusion Models': D-TRAK",
    covers=("intriguing-properties-data-attribution",),
    needs=("data",),
    unit="model",
    claim="gradients of the squared output attribute a denoiser's loss as well as those of the loss, with little "
    "damping better",
)
def dtrak(
    model: nn.Module,
    training: Iterable[Batch],
    queries: Iterable[Batch],
    *,
    output: Loss | None = None,
    checkpoints: Sequence[Any] | None = None,
    dim: int = 1024,
    damping: float = 0.3,
    seed: int = 0,
    pattern: Pattern = "*",
    at_once: int = 64,
) -> Tensor:
    r"""What each training example adds to each query, by the gradient of any output: D-TRAK, for any model.

    .. math:: \phi = P^\top \nabla_\theta \lVert f_\theta(x) \rVert_2^2, \qquad
        \tau = \tfrac1k \sum_c \Phi_q (\Phi^\top \Phi + \lambda I)^{-1} \Phi^\top

    Args:
        model, training, queries, checkpoints, dim, damping, seed, pattern, at_once: as for `trak`.
        output: ``(model, batch) -> number``, summed over the batch's examples; for a diffusion model a mean over time
            steps with noise that is fixed. The default is the squared norm of the model's output; the training loss
            gives the plain variant.

    Returns:
        ``[queries, training examples]`` float64. It has no sign of its own: the larger, the more alike.

    Raises:
        ValueError: no example, or an output of several numbers.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> data = [torch.tensor([[1.0], [2.0]])]
    >>> dtrak(layer, data, data, dim=8, damping=0.0).diagonal().sum().round()    # leverages sum to the rank
    tensor(1., dtype=torch.float64)
    """
    seen, asked = list(training), list(queries)
    total: Tensor | None = None
    used = checkpoints if checkpoints is not None else [None]
    for index, checkpoint in enumerate(used):
        settings: dict[str, Any] = {"dim": dim, "seed": seed + index, "pattern": pattern, "at_once": at_once}
        settings |= {"weights": checkpoint, "loss": output or squared_norm}
        features, wanted = (example_gradients(model, data, **settings) for data in (seen, asked))
        found = kernel_scores(features, wanted, damping=damping)
        total = found if total is None else total + found
    if total is None:
        raise Error("dtrak needs at least 1 checkpoint, got 0")
    return total / len(used)


@card(
    paper="Charpiat, Girard, Felardos, Tarabalka 2019, 'Input Similarity from the Neural Network Perspective'; a mean "
    "over checkpoints as in Pruthi, Liu, Kale, Sundararajan 2020, 'Estimating Training Data Influence by Tracing "
    "Gradient Descent'",
    covers=("intriguing-properties-data-attribution",),
    needs=("data",),
    unit="model",
    claim="the baseline that kernels are to beat",
)
def gradient_cosines(
    model: nn.Module,
    training: Iterable[Batch],
    queries: Iterable[Batch],
    *,
    checkpoints: Sequence[Any] | None = None,
    dim: int | None = 1024,
    seed: int = 0,
    pattern: Pattern = "*",
    at_once: int = 64,
    loss: Loss | None = None,
) -> Tensor:
    r"""Cosines between the gradients of training examples and of queries, a mean over checkpoints.

    .. math:: \tau_{qi} = \tfrac1k \sum_c \cos\bigl(\nabla_\theta \ell(x_q), \nabla_\theta \ell(x_i)\bigr)

    Args:
        model, training, queries, checkpoints, seed, pattern, at_once: as for `trak`.
        dim: numbers that a gradient is squeezed into; None for exact gradients.
        loss: as for `weightsmith.stats.example_gradients`.

    Returns:
        ``[queries, training examples]`` float64 in [-1, 1]; 0 where a gradient vanishes.

    >>> layer = torch.nn.Linear(1, 2)
    >>> data = [(torch.ones(2, 1), torch.tensor([0, 1]))]
    >>> gradient_cosines(layer, data, data).round()
    tensor([[ 1., -1.],
            [-1.,  1.]], dtype=torch.float64)
    """
    seen, asked = list(training), list(queries)
    found = []
    for index, checkpoint in enumerate(checkpoints if checkpoints is not None else [None]):
        settings: dict[str, Any] = {"dim": dim, "seed": seed + index, "pattern": pattern, "at_once": at_once}
        settings |= {"weights": checkpoint, "loss": loss}
        pair = (example_gradients(model, data, **settings).double() for data in (asked, seen))
        one, other = (nn.functional.normalize(rows, dim=1, eps=torch.finfo(torch.float64).tiny) for rows in pair)
        found.append(one @ other.T)
    if not found:
        raise Error("gradient_cosines needs at least 1 checkpoint, got 0")
    return torch.stack(found).mean(dim=0)


@card(
    paper="Park, Georgiev, Ilyas, Leclerc, Madry 2023, 'TRAK: Attributing Model Behavior at Scale'",
    covers=("intriguing-properties-data-attribution",),
    unit="model",
    claim="1 for scores that rank the outputs of retrained models perfectly, about 0 for random ones",
)
def lds(scores: Tensor, subsets: Tensor, outputs: Tensor, *, seed: int = 0) -> Report:
    r"""The linear datamodeling score: do sums of scores over subsets rank what models trained on them say?

    .. math:: \mathrm{LDS}_q = \rho\Bigl(\bigl\{\sum_{i \in S_j} \tau_{qi}\bigr\}_j,\;
        \bigl\{f_q(\theta_{S_j})\bigr\}_j\Bigr)

    with Spearman's rank correlation :math:`\rho`.

    Args:
        scores: ``[m, n]``, what training example i adds to query q.
        subsets: ``[s, n]`` bool, the training examples of each retrained model; s >= 3.
        outputs: ``[s, m]``, what each retrained model says to each query; in the sense that helpful examples raise
            (a margin or a log-likelihood; minus a loss).
        seed: of the bootstrap over queries that gives the interval.

    Returns:
        Report: ``lds`` (the mean over queries), its 95 % interval ``low`` and ``high``, and a row a query. Queries
        whose outputs or sums are all equal have none and do not count.

    Raises:
        ValueError: shapes that do not fit, fewer than three subsets, values that are not finite.

    >>> scores, subsets = torch.tensor([[1.0, 2.0, 4.0]]), torch.eye(3, dtype=torch.bool)
    >>> lds(scores, subsets, torch.tensor([[0.1], [0.2], [0.9]]))["lds"]
    1.0
    """
    if scores.dim() != 2 or subsets.shape[1:] != scores.shape[1:] or outputs.shape != (len(subsets), len(scores)):
        raise Error(
            f"scores {list(scores.shape)} [m, n], subsets {list(subsets.shape)} [s, n] and outputs "
            f"{list(outputs.shape)} [s, m] do not fit"
        )
    if len(subsets) < 3 or not len(scores):
        raise Error(f"lds needs at least 3 subsets and 1 query, got {len(subsets)} and {len(scores)}")
    if not (scores.isfinite().all() and outputs.isfinite().all()):
        raise Error("lds: the scores or the outputs hold values that are not finite, which have no rank")
    sums = scores.double() @ subsets.double().T
    found = correlation(ranked(sums), ranked(outputs.double().T))
    known = found[found.isfinite()]
    low, high = interval_of_mean(known, seed)
    mean = float(known.mean()) if len(known) else None
    rows = [{"query": i, "lds": value if value == value else None} for i, value in enumerate(found.tolist())]
    order = known.sort().values.tolist()
    plot = Plot(
        "Linear datamodeling score",
        "queries, in order",
        "rank correlation",
        [Line("lds", list(range(len(order))), order)],
    )
    figures = {"lds": mean, "low": low, "high": high, "queries": len(known), "subsets": len(subsets)}
    return Report("Linear datamodeling score", figures, rows, [plot])


def margin(model: Any, batch: Batch) -> Tensor:
    """The log-odds of the labels, summed over a batch ``(inputs, labels)``."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise Error("margins need batches (inputs, labels)")
    logits, labels = working(default_forward(model, batch)), batch[1]
    right = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    return (right - others).sum()


def squared_norm(model: Any, batch: Batch) -> Tensor:
    """The squared norm of what the model says, summed over a batch."""
    return working(default_forward(model, batch)).square().sum()


def _residuals(model: nn.Module, batches: Sequence[Batch], checkpoint: Any) -> Tensor:
    """``1 - p`` of the labels, ``[n]``."""
    weights = None if checkpoint is None else fitted(model, checkpoint)

    def called(*inputs: Any, **named: Any) -> Any:
        return model(*inputs, **named) if weights is None else torch.func.functional_call(model, weights, inputs, named)

    parts = []
    with restored(model), torch.no_grad():
        for batch in batches:
            chances = default_forward(called, batch).double().softmax(dim=1)
            parts.append(1 - chances.gather(1, batch[1][:, None])[:, 0])
    return torch.cat(parts)
