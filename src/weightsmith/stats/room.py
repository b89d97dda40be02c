"""The signature of statistics, and the one loop that gathers several of them in one pass.

A `Statistic` holds the settings; for one model it makes a `Counter`, which sees every batch and
says in the end what it found, as `Weights`. How a batch goes into the model, and what a loss is, are
two functions that can be given; by default tuples ``(inputs, labels)`` and the mappings of Hugging
Face models are understood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith import progress
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.weights import Lazy, Step, Weights, apply, same_names, working

Batch = Any
"""What an iterable of data yields: ``inputs``, ``(inputs, labels)`` or a mapping, ``[n, ...]`` each."""

Forward = Callable[[Callable[..., Any], Batch], Tensor]
"""``(model, batch) -> logits [n, ...]``."""

Loss = Callable[[Callable[..., Any], Batch], Tensor]
"""``(model, batch) -> `` a number: minus the log-likelihood of the labels, summed over each example."""

KIND, EXAMPLES, ROWS = "weightsmith.statistic", "weightsmith.examples", "weightsmith.rows"
"""Words in the metadata of statistics, for `combine`. Rows are told by name, as JSON."""

IGNORED = -100  # labels of this value count for nothing, as in PyTorch


UNDERSTOOD = "the weight of a linear layer or an ungrouped convolution that lies [out, in]"
"""Of what the inputs of a layer say all there is to know."""


class NoneFits(Error):
    """No weight of a model that a statistic speaks of fits its pattern."""


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


@runtime_checkable
class CountsRows(Protocol):
    """A counter that some names have no result of: where none of the data came by."""

    def rows(self) -> Mapping[str, float]:
        """Every name it watches, and the rows (positions, patches) that its result rests on; 0 for no result."""
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
    group: Any = None,
) -> dict[str, Weights]:
    """Several statistics in one pass over the data.

    Args:
        model: asked in evaluation mode. Its modes, gradients, buffers and hooks are afterwards what
            they were, also after an error.
        batches: any iterable, read once: ``inputs``, ``(inputs, labels)`` or mappings for Hugging Face models.
        statistics: what to gather, by names of your own: ``{"f": Fisher(), "g": Gram()}``.
        forward: ``(model, batch) -> logits [n, ...]``, where the default does not fit.
        loss: ``(model, batch) -> number``, where the default (cross-entropy of what ``forward`` gives) does not fit.
        group: a process group of `torch.distributed`, or ``"world"``: each process gives its own share of the data,
            which may be none, and gets what one process would have found in all of it (see `reduced`). What goes
            wrong in one of them is an error in all.

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
    forward = forward or default_forward
    access = Access(model, forward, loss or partial(default_loss, forward=forward))
    if group is None:
        return _gathered(access, batches, statistics, empty=False)
    from weightsmith.stats._distributed import together

    return together(lambda: _gathered(access, batches, statistics, empty=True), group)


def _gathered(
    access: Access, batches: Iterable[Batch], statistics: Mapping[str, Statistic], *, empty: bool
) -> dict[str, Weights]:
    """What this process finds in its data."""
    counters = {name: statistic.counter(access) for name, statistic in statistics.items()}
    total = len(batches) if isinstance(batches, Sequence) else 0
    examples = 0
    with restored(access.model), progress.task("statistics", total) as advance:
        for batch in batches:
            examples += size(batch)
            _one(access, counters.values(), batch)
            advance(1)
    if not examples and not empty:
        raise Error("statistics need at least one batch of data, got none")
    return {name: _as_weights(counter, statistics[name].kind, examples) for name, counter in counters.items()}


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


def _as_weights(counter: Counter, kind: str, examples: int) -> Weights:
    rows = dict(counter.rows()) if isinstance(counter, CountsRows) else None
    plain = Weights.of(counter.result())
    return told({name: plain.node(name) for name in plain}, plain.lineage, Said(kind, examples, rows))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and buffers as they were outside."""
    modes = {module: module.training for module in model.modules()}
    tables = [(module._buffers, dict(module._buffers.items())) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for table, held in tables:
            if {name: id(buffer) for name, buffer in table.items()} != {name: id(held[name]) for name in held}:
                table.clear()  # the model put others in their places
                table.update(held)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def combine(*statistics: Weights) -> Weights:
    """One statistic of several shards of data: what a single pass over all of them would have found.

    Sums (Gram matrices) are added; means over examples (Fisher information) are weighted by the examples they rest on,
    means over rows (of activations) by the rows; of maxima the largest is taken, norms are the root of the sum of
    squares. A layer that one shard never called is combined of the others.

    Args:
        statistics: of one kind and one model; they may have been saved and opened again.

    Returns:
        Weights: lazy, computed in float64, with the examples and rows of all.

    Raises:
        ValueError: none given, different kinds, names or shapes, or weights that no statistic of this room made.

    >>> layer, data = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0], [3.0]])
    >>> combine(ws.stats.gram(layer, [data[:1]]), ws.stats.gram(layer, [data[1:]]))["weight"]
    tensor([[14.]])
    """
    if not statistics:
        raise Error("combine needs at least 1 statistic, got 0")
    said = [said_of(found) for found in statistics]
    alike(said, statistics, "combine")
    total = summed(said)
    if len(statistics) == 1:
        return statistics[0]
    made: dict[object, Lazy] = {}
    nodes: dict[str, Lazy] = {}
    for name in dict.fromkeys(name for found in statistics for name in found):
        those = [number for number, found in enumerate(statistics) if name in found]
        members = [statistics[number].node(name) for number in those]
        parts = [part_of(said[number], total, name) for number in those]
        key = (tuple(map(id, members)), tuple(parts))
        if key not in made:
            try:
                made[key] = apply(_combined, *members, options={"parts": parts, "rule": rule_of(total.kind)})
            except Error as error:
                raise Error(f"combine: {name}: {error}") from None
        nodes[name] = made[key]
    return told(nodes, Step("stats.combine", {}, tuple(found.lineage for found in statistics)), total)


MEANS = ("curvature", "fisher", "gradients", "squared gradients")
"""Kinds that are means over examples; the others are sums."""

ROW_MEANS = tuple(
    f"activations {what} of {of}" for what in ("mean", "mean_absolute", "second_moment") for of in ("inputs", "outputs")
)
"""Kinds that are means over rows: positions of examples."""

NORMS = ("activations norm of inputs", "activations norm of outputs")
"""Kinds that are roots of sums of squares."""

MAXIMA = ("activations maximum of inputs", "activations maximum of outputs")
"""Kinds of which the largest is taken."""

Rule = Literal["sum", "mean", "row mean", "norm", "maximum"]


def rule_of(kind: str) -> Rule:
    """How statistics of a kind are combined."""
    rules: dict[Rule, Sequence[str]] = {"mean": MEANS, "row mean": ROW_MEANS, "norm": NORMS, "maximum": MAXIMA}
    for rule, kinds in rules.items():
        if kind in kinds:
            return rule
    return "sum"


class Said(NamedTuple):
    """What a statistic says of itself in its metadata."""

    kind: str
    examples: int
    rows: dict[str, float] | None = None


def said_of(found: Weights) -> Said:
    """Read from its metadata; an error if these weights are no statistic."""
    try:
        rows = json.loads(found.metadata[ROWS]) if ROWS in found.metadata else None
        return Said(found.metadata[KIND], int(found.metadata[EXAMPLES]), rows)
    except (KeyError, ValueError):
        raise Error(
            "combine needs what weightsmith.stats made: these weights do not say of how many examples"
        ) from None


def told(nodes: Mapping[str, Lazy], lineage: Step, said: Said) -> Weights:
    """A statistic, with what it says of itself in its metadata."""
    rows = {} if said.rows is None else {ROWS: json.dumps(said.rows, separators=(",", ":"))}
    return Weights(nodes, lineage, metadata={KIND: said.kind, EXAMPLES: str(said.examples), **rows})


def alike(said: Sequence[Said], names: Sequence[Iterable[str]], what: str) -> None:
    """An error unless statistics are of one kind and one model: they have, or watched in vain, the same names."""
    kinds = sorted({one.kind for one in said})
    if len(kinds) > 1:
        raise Error(f"{what} needs statistics of one kind, got {listed(kinds)}")
    known = [
        dict.fromkeys([*own, *(name for name, rows in (one.rows or {}).items() if not rows)])
        for own, one in zip(names, said, strict=True)
    ]
    for other in known[1:]:
        same_names(known[0], other, f"{what} needs statistics of one model")


def summed(said: Sequence[Said]) -> Said:
    """What their combination says of itself."""
    every = [one.rows for one in said if one.rows is not None]
    rows = None
    if len(every) == len(said):
        rows = {name: sum(own.get(name, 0) for own in every) for own in every for name in own}
    return Said(said[0].kind, sum(one.examples for one in said), rows)


def part_of(one: Said, total: Said, name: str) -> float:
    """What a statistic of some of the data counts in that of all, before `combined_of`."""
    rule = rule_of(one.kind)
    if rule == "mean":
        return one.examples / max(total.examples, 1)
    if rule != "row mean":
        return 1.0
    if one.rows is None or total.rows is None or name not in one.rows:
        raise Error(f"the statistic does not say on how many rows {name} rests; combine before renaming")
    return one.rows[name] / max(total.rows[name], 1)


def entered(found: Tensor, rule: Rule, part: float) -> Tensor:
    """What is added up (or the largest taken of), float64."""
    wide = found.double()
    return wide.square() if rule == "norm" else wide * part


def left(total: Tensor, rule: Rule) -> Tensor:
    """What the total says."""
    return total.sqrt() if rule == "norm" else total


def _combined(*found: Tensor, parts: Sequence[float], rule: Rule) -> Tensor:
    total: Tensor | None = None
    for value, part in zip(found, parts, strict=True):
        one = entered(value, rule, part)
        if total is None:
            total = one
        else:
            total = torch.maximum(total, one) if rule == "maximum" else total.add_(one)
    assert total is not None, "combine makes no node of nothing"
    return left(total, rule).to(found[0].dtype)


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


def default_loss(model: Callable[..., Any], batch: Batch, forward: Forward = default_forward) -> Tensor:
    """Cross-entropy, summed; that of the next token for mappings with ``input_ids`` and logits ``[n, t, v]``."""
    logits = forward(model, batch)
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
        close = did_you_mean(str(pattern), names) if names else ": this model has none that it could be gathered of"
        raise NoneFits(f"no weight to gather statistics of fits {pattern!r}{close}")
