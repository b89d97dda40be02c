"""Which inputs tell the whole answer, not one class picked beforehand.

An explanation of why the answer is class 3 knows that it is class 3, and may point at inputs that merely say so: the
label leaks into its own explanation. Asking instead how much of the whole predicted distribution is left when only
some inputs are seen has no class that could leak.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.attribution._retraining import keep_ranked
from weightsmith.inspect.attribution._shapley import shapley

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(inputs [b, p], masks [b, p] bool) -> log-probabilities [b, c]``: what is known from the unmasked inputs alone."""


@card(
    paper="Jethani, Saporta, Ranganath 2023, 'Don't be fooled: label leakage in explanation methods and the importance "
    "of their quantitative evaluation': SHAP-KL",
    covers=("dont-be-fooled",),
    needs=("data",),
    unit="row",
    claim="inputs that it ranks high predict the true label better on inputs it was not told the label of",
    departs="Shapley values are computed, exactly or by sampling; no explainer network is trained to guess them",
)
def shap_kl(
    predict: Predict,
    inputs: Tensor,
    *,
    value: Literal["kl", "class"] = "kl",
    classes: Tensor | None = None,
    method: Literal["exact", "permutation", "kernel"] | None = None,
    samples: int = 2048,
    seed: int = 0,
    at_once: int = 4096,
) -> Tensor:
    r"""Each input's share of what is known of the answer.

    .. math:: v(S) = -\mathrm{KL}\bigl(p(y \mid x)\,\Vert\, p(y \mid x_S)\bigr)

    Args:
        predict: ``(inputs, masks) -> log-probabilities``, such as `masked_predictor` makes.
        inputs: ``[n, p]``.
        value: ``"class"`` takes :math:`p(\text{class} \mid x_S)` instead, as SHAP does, for comparison.
        classes: ``[n]`` with ``value="class"``; the likeliest ones if None.
        method, samples, seed, at_once: as for `shapley`.

    Returns:
        ``[n, p]`` float64; a row sums to ``v(all) - v(none)``.

    Raises:
        ValueError: inputs that are not ``[n, p]``; what `shapley` refuses.

    >>> def predict(x, seen):                                   # the first input decides, if it is seen
    ...     return torch.log_softmax(torch.where(seen[:, :1], x[:, :1], 0.0) * torch.tensor([[1.0, -1.0]]), dim=1)
    >>> shap_kl(predict, torch.tensor([[1.0, 7.0]])).round(decimals=3)
    tensor([[0.3280, 0.0000]], dtype=torch.float64)
    """
    if inputs.dim() != 2 or not inputs.numel():
        raise Error(f"inputs are [n, p], got {list(inputs.shape)}")
    if value not in ("kl", "class"):
        raise Error(f"value is kl or class, got {value!r}")
    with torch.no_grad():
        full = predict(inputs, torch.ones_like(inputs, dtype=torch.bool)).double()
        wanted = full.argmax(dim=1) if classes is None else classes
        shares = []
        for row, known, label in zip(inputs, full, wanted, strict=True):

            def worth(seen: Tensor, row: Tensor = row, known: Tensor = known, label: Tensor = label) -> Tensor:
                guess = predict(row.expand(len(seen), -1), seen.to(row.device)).double()
                if value == "class":
                    return guess[:, int(label)].exp()
                return -functional.kl_div(guess, known.expand_as(guess), log_target=True, reduction="none").sum(dim=1)

            found = shapley(worth, inputs.shape[1], method=method, samples=samples, seed=seed, at_once=at_once)
            shares.append(found.values)
    return torch.stack(shares)


@card(
    paper="Jethani, Saporta, Ranganath 2023, 'Don't be fooled'; Frye et al. 2021, 'Shapley explainability on "
    "the data manifold': the surrogate",
    covers=("dont-be-fooled",),
    needs=("data",),
    unit="model",
    claim="knows p(y | x_S) for any subset of the inputs",
)
def masked_predictor(
    net: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int = 1500,
    batch: int = 128,
    rate: float = 3e-3,
    seed: int = 0,
) -> Predict:
    r"""A predictor for any part of the inputs, trained with random masks.

    .. math:: \min_\theta\; \mathbb E_{x, S}\; \mathrm{CE}\bigl(\text{targets}(x),\, f_\theta(x_S, S)\bigr),
        \qquad |S| \text{ uniform on } 0, \dots, p

    Args:
        net: takes ``[b, 2 p]``: the inputs with zeros in the places that are not seen, and which are seen; gives
            logits ``[b, c]``. A copy is trained.
        inputs: ``[n, p]``.
        targets: ``[n]`` labels (a predictor to judge with), or ``[n, c]`` probabilities of a model (its surrogate).
        steps: of Adam, with a rate that falls to nothing along a cosine.
        batch: examples a step.
        rate: the learning rate at first.
        seed: of batches and masks.

    Returns:
        ``(inputs, masks) -> log-probabilities``, in evaluation mode.

    Raises:
        ValueError: inputs and targets that do not fit, no step.

    >>> inputs = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> predict = masked_predictor(torch.nn.Linear(4, 2), inputs, (inputs[:, 0] > 0).long(), steps=200, rate=0.1)
    >>> seen = torch.tensor([[True, False], [False, True]])
    >>> bool(predict(torch.full((2, 2), 2.0), seen)[0, 1] > -0.05)
    True
    """
    if inputs.dim() != 2 or len(targets) != len(inputs) or targets.dim() not in (1, 2) or not len(inputs):
        raise Error(f"inputs are [n, p], targets [n] or [n, c]; got {list(inputs.shape)} and {list(targets.shape)}")
    if steps < 1 or batch < 1:
        raise Error(f"steps and batch are at least 1, got {steps} and {batch}")
    trained = copy.deepcopy(net).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad(), torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)  # for dropout, which asks the global generator
        for _ in range(steps):
            rows = torch.randint(len(inputs), (batch,), generator=generator)
            order = torch.rand(batch, inputs.shape[1], generator=generator).argsort(dim=1).argsort(dim=1)
            seen = order < torch.randint(inputs.shape[1] + 1, (batch, 1), generator=generator)
            logits = trained(_hidden(inputs[rows.to(inputs.device)], seen.to(inputs.device)))
            loss = functional.cross_entropy(logits, targets[rows.to(targets.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    trained.eval()

    @torch.no_grad()
    def predict(given: Tensor, masks: Tensor) -> Tensor:
        return trained(_hidden(given, masks)).log_softmax(dim=1)

    return predict


@card(
    paper="Jethani, Saporta, Ranganath 2023, 'Don't be fooled': evaluation",
    covers=("dont-be-fooled",),
    needs=("data",),
    unit="row",
    claim="an attribution is judged by a predictor that had no part in making it",
)
def masked_score(
    predict: Predict,
    scores: Tensor,
    inputs: Tensor,
    labels: Tensor,
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.7),
    seed: int = 0,
) -> Report:
    """How well labels are predicted from the inputs an attribution ranks highest, and from the rest.

    Args:
        predict: a predictor trained with random masks on other data, not the one behind the scores.
        scores: ``[n, p]``, the higher, the more important.
        inputs: ``[n, p]``.
        labels: ``[n]``, the true ones.
        shares: of the inputs that are kept (removed).
        seed: of the lots that equal scores draw.

    Returns:
        Report: mean log-likelihood over the shares with the best inputs ``kept`` (the higher, the better) and
        ``removed`` (the lower, the better), and a row a share with accuracies.

    Raises:
        ValueError: shapes that do not fit.

    >>> def predict(x, seen):
    ...     return torch.log_softmax(torch.where(seen[:, :1], x[:, :1], 0.0) * torch.tensor([[-1.0, 1.0]]), dim=1)
    >>> inputs, labels = torch.tensor([[5.0, 1.0]]), torch.tensor([1])
    >>> found = masked_score(predict, torch.tensor([[1.0, 0.0]]), inputs, labels, shares=[0.5])
    >>> round(found["kept"], 1), round(found["removed"], 2)
    (-0.0, -0.69)
    """
    if not len(shares) or scores.shape != inputs.shape or labels.shape != inputs.shape[:1] or inputs.dim() != 2:
        raise Error(
            f"scores {list(scores.shape)}, inputs {list(inputs.shape)}, labels {list(labels.shape)} do not fit, or "
            "there is no share"
        )
    rows = []
    for share in shares:
        row: dict[str, float] = {"share": share}
        kept = keep_ranked(torch.ones_like(inputs), scores, share, seed=seed).bool()
        for word, seen in (("kept", kept), ("removed", ~kept)):
            guess = predict(inputs, seen)
            row[f"log-likelihood, {word}"] = float(guess.gather(1, labels[:, None]).double().mean())
            row[f"accuracy, {word}"] = float((guess.argmax(dim=1) == labels).double().mean())
        rows.append(row)
    means = {word: sum(row[f"log-likelihood, {word}"] for row in rows) / len(rows) for word in ("kept", "removed")}
    lines = [Line(word, list(shares), [row[f"log-likelihood, {word}"] for row in rows]) for word in means]
    plot = Plot("Prediction from a part", "share of inputs", "log-likelihood, nats", lines)
    accuracy = {f"accuracy, {word}": sum(row[f"accuracy, {word}"] for row in rows) / len(rows) for word in means}
    return Report("Prediction from what is ranked highest", {**means, **accuracy}, rows, [plot])


def _hidden(inputs: Tensor, seen: Tensor) -> Tensor:
    return torch.cat([inputs.where(seen, 0), seen.to(inputs.dtype)], dim=1)  # not a product: what is missing may be NaN
