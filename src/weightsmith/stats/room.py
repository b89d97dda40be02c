"""The signature of statistics, and the one loop that gathers several of them in one pass.

A `Statistic` holds the settings; for one model it makes a `Counter`, which sees every batch and
says in the end what it found, as `Weights`. How a batch goes into the model, and what a loss is, are
two functions that can be given; by default tuples ``(inputs, labels)`` and the mappings of Hugging
Face models are understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith import progress
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.weights import Weights, same_names, working

Batch = Any
"""What an iterable of data yields: ``inputs``, ``(inputs, labels)`` or a mapping, ``[n, ...]`` each."""

Forward = Callable[[Callable[..., Any], Batch], Tensor]
"""``(model, batch) -> logits [n, ...]``."""

Loss = Callable[[Callable[..., Any], Batch], Tensor]
"""``(model, batch) -> `` a number: minus the log-likelihood of the labels, summed over each example."""

KIND, EXAMPLES = "weightsmith.statistic", "weightsmith.examples"
"""Words in the metadata of statistics, for `combine`."""

IGNORED = -100  # labels of this value count for nothing, as in PyTorch


@dataclass(frozen=True)
class Access:
    """A model and how to ask it."""

    model: nn.Module
    forward: Forward
    loss: Loss


class Counter(Protocol):
    """What adds up over batches."""

    def watching(self, batch: Batch) -> AbstractContextManager[None] | None:
        """Hooks for a plain forward pass over the batch, on inside only; None where none is needed."""
        ...

    def see(self, batch: Batch) -> None:
        """One batch, after its forward pass."""
        ...

    def result(self) -> dict[str, Tensor]:
        """What was found, by the weights' names."""
        ...


class Statistic(Protocol):
    """The settings of a statistic. ``kind`` is its word in the metadata."""

    @property
    def kind(self) -> str: ...

    def counter(self, access: Access) -> Counter: ...


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    statistics: Mapping[str, Statistic],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
) -> dict[str, Weights]:
    """Several statistics in one pass over the data.

    Args:
        model: asked in evaluation mode. Its modes, gradients, buffers and hooks are afterwards what
            they were, also after an error.
        batches: any iterable, read once: ``inputs``, ``(inputs, labels)`` or mappings for Hugging Face models.
        statistics: what to gather, by names of your own: ``{"f": Fisher(), "g": Gram()}``.
        forward: ``(model, batch) -> logits [n, ...]``, where the default does not fit.
        loss: ``(model, batch) -> number``, where the default (cross-entropy) does not fit.

    Returns:
        dict[str, Weights]: under the same names. The metadata count the examples, for `combine`.

    Raises:
        ValueError: no statistic, no batch, or a batch that the defaults do not understand.

    >>> layer = torch.nn.Linear(2, 3)
    >>> found = collect(layer, [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))], {"g": ws.stats.Gram()})
    >>> found["g"]["weight"]
    tensor([[4., 4.],
            [4., 4.]])
    """
    if not statistics:
        raise Error('collect needs at least one statistic, such as {"fisher": weightsmith.stats.Fisher()}')
    access = Access(model, forward or default_forward, loss or default_loss)
    counters = {name: statistic.counter(access) for name, statistic in statistics.items()}
    total = len(batches) if isinstance(batches, Sequence) else 0
    examples = 0
    with restored(model), progress.task("statistics", total) as advance:
        for batch in batches:
            examples += size(batch)
            _one(access, counters.values(), batch)
            advance(1)
    if not examples:
        raise Error("statistics need at least one batch of data, got none")
    return {name: _as_weights(counter.result(), statistics[name].kind, examples) for name, counter in counters.items()}


def _one(access: Access, counters: Iterable[Counter], batch: Batch) -> None:
    with ExitStack() as hooks:
        watching = [w for w in (counter.watching(batch) for counter in counters) if w is not None]
        for watch in watching:
            hooks.enter_context(watch)
        if watching:
            with torch.no_grad():
                access.forward(access.model, batch)
    for counter in counters:
        counter.see(batch)


def _as_weights(found: Mapping[str, Tensor], kind: str, examples: int) -> Weights:
    plain = Weights.of(found)
    nodes = {name: plain.node(name) for name in plain}
    return Weights(nodes, plain.lineage, metadata={KIND: kind, EXAMPLES: str(examples)})


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and buffers as they were outside."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def combine(*statistics: Weights) -> Weights:
    """One statistic of several shards of data: what a single pass over all of them would have found.

    Sums (Gram matrices) are added; means (Fisher information) are weighted by the examples they rest on.

    Args:
        statistics: of one kind and one model; they may have been saved and opened again.

    Returns:
        Weights: lazy, with the examples of all.

    Raises:
        ValueError: none given, different kinds or names, or weights that no statistic of this room made.

    >>> layer, data = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0], [3.0]])
    >>> combine(ws.stats.gram(layer, [data[:1]]), ws.stats.gram(layer, [data[1:]]))["weight"]
    tensor([[14.]])
    """
    if not statistics:
        raise Error("combine needs at least 1 statistic, got 0")
    kinds, counts = zip(*(_said(found) for found in statistics), strict=True)
    if len(set(kinds)) > 1:
        raise Error(f"combine needs statistics of one kind, got {listed(sorted(set(kinds)))}")
    first, total = statistics[0], sum(counts)
    for other in statistics[1:]:
        same_names(first, other, "combine needs statistics of one model")
    parts = [count / total for count in counts] if kinds[0] in MEANS else [1.0] * len(counts)
    # Not 0 + ..., so that one statistic alone stays as it is, and the sum is taken before it is rounded.
    added = first.map(_weighted, *statistics[1:], options={"parts": lambda name: parts}) if len(counts) > 1 else first
    nodes = {name: added.node(name) for name in added}
    return Weights(nodes, added.lineage, metadata={KIND: kinds[0], EXAMPLES: str(total)})


MEANS = ("fisher",)
"""Kinds that are means over examples; the others are sums."""


def _weighted(*found: Tensor, parts: Sequence[float]) -> Tensor:
    total = torch.zeros_like(found[0], dtype=torch.float64)
    for value, part in zip(found, parts, strict=True):
        total.add_(value, alpha=part)
    return total.to(found[0].dtype)


def _said(found: Weights) -> tuple[str, int]:
    try:
        return found.metadata[KIND], int(found.metadata[EXAMPLES])
    except (KeyError, ValueError):
        raise Error(
            "combine needs what weightsmith.stats made: these weights do not say of how many examples"
        ) from None


# Batches


def size(batch: Batch) -> int:
    """The examples in a batch: the length of its first tensor."""
    tensors = [value for value in _values(batch) if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise Error(f"a batch is a tensor, a tuple or a mapping of tensors [n, ...]; got a {type(batch).__name__}")
    return len(tensors[0])


def mapped(function: Callable[[Tensor], Any], batch: Batch) -> Any:
    """A batch of the same form, with ``function`` of each of its tensors; other values stay."""
    if isinstance(batch, Mapping):
        return {name: mapped(function, value) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(mapped(function, value) for value in batch)
    return function(batch) if isinstance(batch, Tensor) and batch.dim() else batch


def _values(batch: Batch) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    return batch if isinstance(batch, list | tuple) else (batch,)


def default_forward(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The logits for ``inputs``, ``(inputs, labels)`` or a mapping, whose ``labels`` the model is not shown."""
    if isinstance(batch, Mapping):
        found = model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        found = model(batch[0] if isinstance(batch, list | tuple) else batch)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor):
        raise Error(f"the model returns a {type(found).__name__} without logits; give forward=(model, batch) -> logits")
    return logits


def default_loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Cross-entropy, summed; that of the next token for mappings with ``input_ids`` and logits ``[n, t, v]``."""
    logits = default_forward(model, batch)
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("input_ids"))
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        raise Error("the batches have no labels: yield (inputs, labels), or give loss=(model, batch) -> number")
    rows, targets = predictions(logits, batch), labels
    if rows.shape != logits.shape:
        targets = labels[:, 1:].where(counted(logits, batch), IGNORED)
    if rows.dim() not in (2, 3) or targets.shape != rows.shape[:-1]:
        raise Error(f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit; give loss=")
    return functional.cross_entropy(
        rows.reshape(-1, rows.shape[-1]), targets.reshape(-1), reduction="sum", ignore_index=IGNORED
    )


def predictions(logits: Tensor, batch: Batch) -> Tensor:
    """The logits that predict something: all, or all but those after the last token of a text."""
    text = isinstance(batch, Mapping) and "input_ids" in batch and logits.dim() == 3
    return working(logits[:, :-1] if text else logits)


def counted(logits: Tensor, batch: Batch) -> Tensor:
    """Which predictions count, ``[n, ...]``: those of tokens that are neither padding nor labelled -100."""
    rows = predictions(logits, batch)
    keep = torch.ones(rows.shape[:-1], dtype=torch.bool, device=logits.device)
    if not isinstance(batch, Mapping) or logits.dim() != 3:
        return keep
    first = logits.shape[1] - rows.shape[1]
    for name, nothing in (("attention_mask", 0), ("labels", IGNORED)):
        if isinstance(batch.get(name), Tensor):
            keep = keep & (batch[name][:, first:] != nothing)
    return keep


def chosen_names(names: Iterable[str], chosen: Sequence[str], pattern: object) -> None:
    """An error if a pattern fits no name."""
    if not chosen:
        names = list(names)
        raise Error(f"no weight to gather statistics of fits {pattern!r}{did_you_mean(str(pattern), names)}")
