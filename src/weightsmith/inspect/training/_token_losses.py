"""Which tokens a language model learns, and which it gives up: losses token by token, by how frequent each is.

A mean loss is that of the frequent tokens, though most of the vocabulary is rare. Weight decay can treat the two
differently: a rare token's row is pulled towards zero at every step and pushed back only when the token comes up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._models import parameters_of, untouched
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.training._parts import at_least, rank_correlation
from weightsmith.stats import Batch, Forward
from weightsmith.stats.room import IGNORED, counted, default_forward, predictions
from weightsmith.weights import Pattern

Equal = Literal["tokens", "text"]


def token_counts(batches: Iterable[Batch], vocabulary: int) -> Tensor:
    """How often each token comes up in texts.

    Args:
        batches: mappings with ``input_ids`` ``[n, t]`` (but what their ``attention_mask`` leaves out), or tensors of
            ids.
        vocabulary: number of tokens v.

    Returns:
        ``[v]`` int64.

    Raises:
        ValueError: a token that is not in the vocabulary.

    >>> token_counts([torch.tensor([[0, 2, 2]])], 3).tolist()
    [1, 0, 2]
    """
    at_least(1, vocabulary=vocabulary)
    total = torch.zeros(vocabulary, dtype=torch.long)
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        keep = torch.ones_like(ids, dtype=torch.bool)
        if not isinstance(batch, Tensor) and isinstance(batch.get("attention_mask"), Tensor):
            keep = batch["attention_mask"] != 0
        chosen = ids[keep].cpu()
        _inside(chosen, vocabulary, "token")
        total += chosen.bincount(minlength=vocabulary)
    return total


def _inside(ids: Tensor, vocabulary: int, what: str) -> None:
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise Error(f"{what} {int(outside[0])} does not fit a vocabulary of {vocabulary} tokens")


def frequency_buckets(counts: Tensor, buckets: int = 5, *, equal: Equal = "tokens") -> Tensor:
    """Tokens in groups, from the most frequent (0) to the rarest.

    Args:
        counts: ``[v]`` how often each token comes up.
        buckets: how many groups.
        equal: what the groups have the same share of: of the different ``"tokens"`` that come up at all, or of the
            running ``"text"`` (a group may then be empty, where one token is more than a group).

    Returns:
        ``[v]`` int64; -1 for tokens that never come up.

    Raises:
        ValueError: no token comes up, a negative count, no bucket.

    >>> frequency_buckets(torch.tensor([1, 10, 0, 2, 1]), 2).tolist()
    [1, 0, -1, 0, 1]
    >>> frequency_buckets(torch.tensor([1, 10, 0, 2, 1]), 2, equal="text").tolist()
    [1, 0, -1, 1, 1]
    """
    at_least(1, buckets=buckets)
    if equal not in get_args(Equal):
        raise Error(f"equal is one of {', '.join(get_args(Equal))}; got {equal!r}")
    if counts.dim() != 1 or not (counts > 0).any() or (counts < 0).any():
        raise Error(f"counts are [v], none below 0 and one above, got {list(counts.shape)}")
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    weight = torch.ones_like(order, dtype=torch.float64) if equal == "tokens" else counts[order].double()
    middles = (weight.cumsum(0) - weight / 2) / weight.sum()
    found = torch.full_like(counts, -1, dtype=torch.long)
    found[order] = (middles * buckets).long().clamp(max=buckets - 1)
    return found


def label_losses(model: nn.Module, batch: Batch, *, forward: Forward | None = None) -> tuple[Tensor, Tensor]:
    """The losses of a batch's predictions ``[m]``, and the token that each was to predict ``[m]``.

    Padding and labels of -100 are left out. For a causal model each position predicts the next token; the gradient
    is not recorded, and the model's mode is left to the caller.

    Args:
        model: a language model, or a classifier whose classes count as tokens.
        batch: a mapping with ``input_ids`` ``[n, t]``, such a tensor, or ``(inputs, labels)``.
        forward: ``(model, batch) -> logits [n, t, v]``, where the default does not fit.

    Raises:
        ValueError: logits and labels that do not fit.

    >>> uniform = lambda input_ids: torch.zeros(1, 3, 4)
    >>> losses, labels = label_losses(uniform, {"input_ids": torch.tensor([[0, 1, 3]])})
    >>> losses, labels
    (tensor([1.3863, 1.3863]), tensor([1, 3]))
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    with torch.no_grad():
        logits = (forward or default_forward)(model, batch)
    labels = batch.get("labels", batch["input_ids"]) if isinstance(batch, Mapping) else batch[1]
    rows, keep = predictions(logits, batch), counted(logits, batch)
    targets = labels[:, 1:] if rows.shape != logits.shape else labels
    if targets.shape != keep.shape:
        raise Error(f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit")
    keep = keep & (targets != IGNORED)
    chosen = targets[keep]
    return functional.cross_entropy(rows[keep], chosen, reduction="none"), chosen


class TokenLosses:
    """Losses token by token along a run: the mean of each, and when it was learned.

    A token counts as learned at the first step at which the running mean of its losses is below a share of that of
    guessing, :math:`\\ln v`.

    Args:
        counts: ``[v]`` of the tokens in the training text.
        buckets: groups by frequency, from the most frequent to the rarest.
        equal: what they share evenly, as for `frequency_buckets`.
        learned: the share of :math:`\\ln v` below which a token counts as learned.
        memory: how much of a running mean stays at each step in which the token comes up.

    It keeps six numbers a token, and one a bucket and step.

    >>> watch = TokenLosses(torch.tensor([8, 2]), buckets=2)
    >>> watch.step(torch.tensor([0.1, 0.3, 0.9]), torch.tensor([0, 0, 1]))
    >>> [round(loss, 4) for loss in watch.report()["loss"]]
    [0.2, 0.9]
    """

    def __init__(
        self, counts: Tensor, buckets: int = 5, *, equal: Equal = "tokens", learned: float = 0.5, memory: float = 0.9
    ) -> None:
        if not 0 <= memory < 1:
            raise Error(f"memory lies in [0, 1), got {memory}")
        self.counts = counts.detach().cpu()
        self.bucket = frequency_buckets(self.counts, buckets, equal=equal)
        self.buckets, self.memory = buckets, memory
        self.limit = learned * math.log(len(counts))
        empty = torch.zeros(len(counts), dtype=torch.float64)
        self.sums, self.seen = empty.clone(), empty.clone()
        self.running = torch.full_like(empty, math.nan)
        self.learned = torch.full((len(counts),), -1, dtype=torch.long)
        self.steps = 0
        self.curves: list[list[float]] = []

    def step(self, losses: Tensor, labels: Tensor) -> None:
        """Note the losses of some predictions, and the tokens they were of; of any one shape, without ignored ones."""
        if losses.shape != labels.shape:
            raise Error(f"losses {list(losses.shape)} and labels {list(labels.shape)} do not fit")
        values, ids = losses.detach().double().cpu().flatten(), labels.detach().cpu().flatten()
        _inside(ids, len(self.counts), "label")
        size = len(self.counts)
        seen = ids.bincount(minlength=size).double()
        sums = ids.bincount(values, minlength=size).double()
        now = seen > 0
        mean = sums / seen.clamp(min=1)
        first = now & self.running.isnan()
        kept = self.memory * self.running + (1 - self.memory) * mean
        self.running = torch.where(first, mean, torch.where(now, kept, self.running))
        new = now & (self.running < self.limit) & (self.learned < 0)
        self.learned[new] = self.steps
        self.sums += sums
        self.seen += seen
        self.steps += 1
        self.curves.append([_mean(mean[now & (self.bucket == place)]) for place in range(self.buckets)])

    def report(self) -> Report:
        """Losses by bucket over all that was noted, and when tokens were learned."""
        if not self.steps:
            raise Error("a report needs at least one step")
        found = _by_frequency(self.sums, self.seen, self.counts, self.bucket, self.buckets)
        rows = []
        for row, place in zip(found.table, range(self.buckets), strict=True):
            inside = (self.bucket == place) & (self.seen > 0)
            when = self.learned[inside]
            rows.append(
                {
                    **row,
                    "learned": float((when >= 0).double().mean()) if len(when) else math.nan,
                    "step learned": _median(when[when >= 0]),
                    "running loss": _mean(self.running[inside]),
                }
            )
        curves = [Line(f"bucket {place}", list(range(self.steps)), [row[place] for row in self.curves])
                  for place in range(self.buckets)]  # fmt: skip
        plots = [*found.plots, Plot("Losses along the run", "step", "mean loss of the bucket's tokens, nats", curves)]
        return Report(found.title, found.figures, rows, plots, found.notes)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _median(values: Tensor) -> float:
    return float(values.double().quantile(0.5)) if len(values) else math.nan


def _by_frequency(sums: Tensor, seen: Tensor, counts: Tensor, bucket: Tensor, buckets: int) -> Report:
    """Mean losses by bucket, from the sum of losses ``[v]`` and the number of predictions ``[v]`` of each token."""
    means = sums / seen.clamp(min=1)
    rows = []
    for place in range(buckets):
        inside = bucket == place
        noted = inside & (seen > 0)
        rows.append(
            {
                "bucket": place,
                "tokens": int(inside.sum()),
                "mean count": _mean(counts[inside].double()),
                "share of text": float(counts[inside].sum()) / float(counts.sum()),
                "predictions": int(seen[inside].sum()),
                "loss": _mean(means[noted]),
                "loss over text": float(sums[inside].sum() / seen[inside].sum()) if noted.any() else math.nan,
            }
        )
    noted = seen > 0
    losses = [row["loss"] for row in rows if not math.isnan(row["loss"])]
    figures = {
        "mean over text": float(sums.sum() / seen.sum().clamp(min=1)),
        "mean over tokens": _mean(means[noted]),
        "gap": losses[-1] - losses[0] if losses else math.nan,
        "rank correlation with count": rank_correlation(means[noted], counts[noted].double()),
        "tokens without a prediction": int((~noted).sum()),
    }
    bars = Line("loss", [str(row["bucket"]) for row in rows], [row["loss"] for row in rows], style="bars")
    plot = Plot("Loss by frequency", "bucket, from the most frequent", "mean loss of its tokens, nats", [bars])
    return Report("Losses of tokens by their frequency", figures, rows, [plot])


@card(
    paper="Pinto, Galanti, Balestriero 2024, 'The Fair Language Model Paradox'",
    covers=("fair-language-model-paradox",),
    needs=("data",),
    unit="model",
    claim="what weight decay does to the loss of rare tokens is not what the mean over the text shows",
)
def token_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    counts: Tensor | None = None,
    *,
    buckets: int = 5,
    equal: Equal = "tokens",
    forward: Forward | None = None,
) -> Report:
    r"""The loss of a language model token by token, in buckets from the most frequent tokens to the rarest.

    .. math:: \bar\ell_v = \frac{1}{|\{t : y_t = v\}|} \sum_{t : y_t = v} -\log p(y_t \mid x_{\le t}), \qquad
        L_b = \frac{1}{|b|} \sum_{v \in b} \bar\ell_v

    Args:
        model: a causal language model, in evaluation mode, left as it was.
        batches: mappings with ``input_ids`` ``[n, t]``, or such tensors; read once.
        counts: ``[v]`` of the tokens in the *training* text (`token_counts`); by default those of the batches.
        buckets, equal: as for `frequency_buckets`.
        forward: ``(model, batch) -> logits [n, t, v]``, where the default does not fit.

    Returns:
        Report: a row a bucket: its tokens, their ``mean count``, the ``loss`` (a mean over its tokens) and the ``loss
        over text`` (over predictions). In the figures both means over all, and the ``gap``: the loss of the rarest
        bucket less that of the most frequent, of those with predictions. Memory: two numbers a token, beside the
        logits of a batch.

    Raises:
        ValueError: no batch, no prediction, counts of another vocabulary.
    """
    known = torch.ones(1) if counts is None else counts.detach().cpu()
    bucket = frequency_buckets(known, buckets, equal=equal)  # before the pass, so that what does not fit is found
    sums = seen = torch.zeros(0 if counts is None else len(known), dtype=torch.float64)
    with untouched(model):
        for batch in batches:
            losses, labels = (found.cpu() for found in label_losses(model, batch, forward=forward))
            if counts is not None:
                _inside(labels, len(counts), "label")
            sums = _longer(sums, labels.bincount(losses.double(), minlength=len(sums)).double())
            seen = _longer(seen, labels.bincount(minlength=len(seen)).double())
    if not float(seen.sum()):
        raise Error("token_losses needs at least one prediction, got none")
    if counts is None:
        known = seen.long()
        bucket = frequency_buckets(known, buckets, equal=equal)
    return _by_frequency(sums, seen, known, bucket, buckets)


def _longer(total: Tensor, part: Tensor) -> Tensor:
    size = max(len(total), len(part))
    return functional.pad(total, (0, size - len(total))) + functional.pad(part, (0, size - len(part)))


@card(
    paper="Pinto, Galanti, Balestriero 2024, 'The Fair Language Model Paradox'",
    covers=("fair-language-model-paradox",),
    unit="tensor",
)
def row_norms(rows: Tensor, counts: Tensor, *, buckets: int = 5, equal: Equal = "tokens") -> Report:
    r"""The length of each token's row in an embedding or a head, by the token's frequency.

    Args:
        rows: ``[v, d]`` weights of the embedding or of the head.
        counts: ``[v]`` of the tokens in the training text.
        buckets, equal: as for `frequency_buckets`.

    Returns:
        Report: a row a bucket: ``norm`` (mean), ``smallest`` and ``largest``; in the figures the rank correlation of
        norm and count, and the ``slope`` of their logarithms, over tokens that come up.

    Raises:
        ValueError: counts of another vocabulary.

    >>> row_norms(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 9.0]]), torch.tensor([10, 1, 0]), buckets=2)["norm"]
    [5.0, 1.0]
    """
    if rows.dim() != 2 or counts.shape != rows.shape[:1]:
        raise Error(f"rows [v, d] and counts [v] do not fit: {list(rows.shape)} and {list(counts.shape)}")
    lengths = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64).cpu()
    known = counts.detach().cpu()
    bucket = frequency_buckets(known, buckets, equal=equal)
    table = []
    for place in range(buckets):
        inside = lengths[bucket == place]
        table.append(
            {
                "bucket": place,
                "tokens": len(inside),
                "mean count": _mean(known[bucket == place].double()),
                "norm": _mean(inside),
                "smallest": float(inside.min()) if len(inside) else math.nan,
                "largest": float(inside.max()) if len(inside) else math.nan,
            }
        )
    used = (known > 0) & (lengths > 0)
    x, y = known[used].double().log(), lengths[used].log()
    x = x - x.mean()
    spread = float(x.square().sum())
    figures = {
        "rank correlation with count": rank_correlation(lengths[known > 0], known[known > 0].double()),
        "slope": float((x * y).sum()) / spread if spread else math.nan,
        "mean norm of tokens that never come up": _mean(lengths[known == 0]),
    }
    bars = Line("norm", [str(row["bucket"]) for row in table], [row["norm"] for row in table],
                [row["smallest"] for row in table], [row["largest"] for row in table], style="bars")  # fmt: skip
    plot = Plot("Rows by frequency", "bucket, from the most frequent", "norm of a token's row", [bars])
    return Report("Rows of tokens by their frequency", figures, table, [plot])


def frequency_decay(counts: Tensor, decay: float, *, power: float = 1.0) -> Tensor:
    r"""A weight decay for each token's row, smaller for rarer tokens.

    .. math:: \lambda_v = \lambda \left( \frac{c_v}{\max_u c_u} \right)^{p}

    so that a row shrinks about as often as it is pushed back. ``power=0`` is the same decay for all. It is no paper's,
    but what the mechanism suggests.

    Args:
        counts: ``[v]`` of the tokens in the training text.
        decay: :math:`\lambda`, that of the most frequent token.
        power: p.

    Returns:
        ``[v]`` float32. Applied beside an optimizer whose group for these rows (`decay_groups`) has no decay of its
        own: ``rows.mul_(1 - rate * frequency_decay(counts, decay)[:, None])``.

    Raises:
        ValueError: decay, power or a count below 0, no count above.

    >>> frequency_decay(torch.tensor([8, 2, 0]), 0.4)
    tensor([0.4000, 0.1000, 0.0000])
    """
    if decay < 0 or power < 0:
        raise Error(f"decay and power are at least 0, got {decay} and {power}")
    if counts.dim() != 1 or not (counts > 0).any() or (counts < 0).any():
        raise Error(f"counts are [v], none below 0 and one above, got {list(counts.shape)}")
    return decay * (counts.float() / counts.max()) ** power


def decay_groups(model: nn.Module, rows: Pattern, decay: float, *, vectors: bool = False) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay for all but the rows of tokens.

    Args:
        model: its parameters go into one of two groups.
        rows: names of the embedding and the head, whose rows get no decay here (or that of `frequency_decay`).
        decay: of all others.
        vectors: whether parameters of one axis (biases, norms) get decay as well.

    Returns:
        Two groups, ``{"params": [...], "weight_decay": ...}``: with decay, and without.

    Raises:
        ValueError: no parameter fits ``rows``, a decay below 0.

    >>> net = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3))
    >>> [(len(group["params"]), group["weight_decay"]) for group in decay_groups(net, "0.*", 0.1)]
    [(1, 0.1), (2, 0.0)]
    """
    if decay < 0:
        raise Error(f"decay is at least 0, got {decay}")
    exempt = set(parameters_of(model, rows))
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[name in exempt or (parameter.dim() < 2 and not vectors)]["params"].append(parameter)
    return groups
