"""One block of a model at a time: for models larger than memory, and for changes that later blocks should see.

What a block is given is recorded; its weights are loaded; statistics of its inputs are gathered; a visitor looks at
it and may return new weights; and what the block then gives is what the next one is given. A block that was changed
makes up for what the blocks before it have lost, if it sees what they give now.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith import progress
from weightsmith._version import __version__
from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.stats._gram import Gram
from weightsmith.stats._walk_inputs import Arguments, CallRecorder, InFile, InMemory, Run, digest, first_of, on_device
from weightsmith.stats._walk_modules import Filler, blocks_of, described, naming, prefix_of, under, without_cache
from weightsmith.stats.room import (
    UNDERSTOOD,
    Access,
    Batch,
    Forward,
    NoneFits,
    Statistic,
    collect,
    default_forward,
    default_loss,
    restored,
)
from weightsmith.weights import Held, Step, Weights, as_dtype, open
from weightsmith.weights._layers import copied

Propagate = Literal["changed", "dense"]
"""What the next block is given: what this one gives with its new weights, or with its old ones."""

Visit = Callable[["Block"], Mapping[str, Tensor] | None]
"""Looks at a block, and returns new tensors by their names, or None."""


@dataclass(frozen=True)
class Block:
    """One block, while it is visited.

    Attributes:
        name: its name in the weights, such as ``"model.layers.3"``.
        index: how many blocks there are before it.
        count: how many there are in all.
        module: the block with its weights, in the dtype and on the device of the walk, in evaluation mode. For looking
            at: its tensors may be those of the weights themselves, so train a copy (``copy.deepcopy``).
        weights: its tensors as they are in the weights, in their own dtype, under their full names.
        statistics: what was gathered of its inputs, by the names that were given; a statistic that speaks of no
            tensor in this block is empty.
        batches: its recorded inputs, for `forward` or for `weightsmith.stats.collect`.
    """

    name: str
    index: int
    count: int
    module: nn.Module
    weights: Weights
    statistics: Mapping[str, Weights]
    batches: Sequence[Batch]
    _forward: Callable[[nn.Module, Batch], Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors."""
        return tuple(self.weights)

    def check_understood(self, names: Iterable[str]) -> None:
        """An error for a tensor that is no `UNDERSTOOD`, so that no Gram matrix could ever be gathered for it."""
        for name in names:
            inner = name.removeprefix(f"{self.name}.") if self.name else name
            try:
                Gram(lambda other, inner=inner: other == inner).counter(Access(self.module, self.forward, self.forward))
            except Error:
                raise Error(
                    f"{name} is not {UNDERSTOOD}, so the inputs of its layer do not say what it may lose; leave it out "
                    "with pattern="
                ) from None

    def forward(self, module: Callable[..., Any], batch: Batch) -> Tensor:
        """The hidden state ``[n, ...]`` after a module that is called as this block is."""
        return self._forward(module, batch)  # type: ignore[arg-type]

    def outputs(self, module: nn.Module | None = None) -> Iterator[Tensor]:
        """The hidden state after each batch, of the block or of a changed copy of it, one at a time."""
        for batch in self.batches:
            with torch.no_grad():
                found = self._forward(module or self.module, batch)
            yield found


def walk(
    weights: Any,
    batches: Iterable[Batch],
    visit: Visit,
    *,
    model: nn.Module | None = None,
    blocks: str | Sequence[str] | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    propagate: Propagate = "changed",
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    keep: bool = True,
    empty: bool = False,
    compute: torch.dtype | str | None = None,
) -> Weights:
    """Visit the blocks of a model in their order, each with its inputs, and change them on the way.

    Memory holds the stem (all that runs before the first block) or one block, in ``dtype``; its statistics; and
    the hidden states of all batches, ``batches x [n, ...]`` once (twice with statistics and ``propagate="dense"``). It
    does not grow with the number of blocks but for the new tensors, which without ``store`` are held. With it, both
    hidden states and new tensors lie on disk.

    How blocks are called (masks, positions) is recorded from the model itself, for each block, and equal tensors are
    kept once; masks of padded texts differ and take ``[n, 1, t, t]`` each. What follows the last block never runs.

    Args:
        weights: anything `weightsmith.open` opens. From the ``config.json`` beside them the module is made
            without weights. A module is walked as it is, and is afterwards what it was.
        batches: ``inputs``, ``(inputs, labels)`` or mappings; read once (held, where ``store`` is given).
            Tokens whose ``attention_mask`` is 0 are left out of statistics.
        visit: is called with each `Block` that has tensors, in order; may return new tensors by their names, which are
            rounded to their dtype in the weights.
        model: the module, where it is not to be made from a config: with weights or without (`hollow`). Those of
            ``weights`` count.
        blocks: names of modules that follow one another with nothing between them, or of the container whose children
            they are; by default the one list or sequence of modules.
        statistics: what to gather of each block's inputs (before it is changed), such as ``{"gram": Gram()}``.
            Those of gradients need a loss, which a block does not have.
        propagate: what the next block is given: what this one gives ``"changed"`` or still ``"dense"``.
        dtype: of weights and hidden states while blocks run; None for those of the weights. Grams are float32
            in any case. Buffers that no checkpoint holds keep theirs.
        device: where blocks run; default: where the module is, else the CPU. Hidden states wait on the CPU.
        forward: ``(model, batch) -> anything``, where the default does not fit; it is stopped at the last block.
        store: an empty or new folder for what was made so far.
        resume: continue the walk of ``store``, after its last finished block. The result is the same to the bit.
        settings: what else ``visit`` depends on, in plain values; with other ones a store is not continued.
        keep: False where new tensors are only what later blocks are to see, and a visitor keeps what it made by itself:
            they are neither held nor stored, and the result is the given weights.
        compute: ``"bfloat16"`` for products in half the width (autocast), with weights and hidden states as they are.
        empty: True where blocks without tensors (an activation between two layers) are to be visited too.

    Returns:
        Weights: lazy, the given ones with the new tensors in their places (read from ``store``, if there is one).

    Raises:
        ValueError: no batch, blocks that cannot be found or that do not follow one another, weights that do not
            fit the module, new tensors of other names or shapes or of weights that are tied, a store of another walk.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    >>> def halve(block):
    ...     return {name: block.weights[name] / 2 for name in block.names}
    >>> halved = walk(net, [torch.ones(1, 2)], halve)
    >>> torch.equal(2 * halved["1.weight"], net[1].weight)
    True
    """
    if propagate not in get_args(Propagate):
        raise Error(f"propagate is 'changed' or 'dense', got {propagate!r}")
    if resume and store is None:
        raise Error("resume=True continues what is in store=, and no folder is given")
    opened = open(weights)
    width = None if dtype is None else as_dtype(dtype)
    module = weights if model is None and isinstance(weights, nn.Module) else model
    module = described(opened, width) if module is None else module
    place = _device(module, device)
    names = blocks_of(module, opened, blocks)
    filler = Filler(module, opened, naming(module, names, opened), width, place)
    asked = _asked(module, names, filler, statistics or {})
    if store is not None:
        batches = list(batches)
    products = None if compute is None else as_dtype(compute)
    walker = _Walker(filler, names, asked, visit, propagate, forward or default_forward, keep, empty, products)
    mark = {} if store is None else _mark(walker, batches, statistics or {}, settings)
    run = None if store is None else Run(store, mark, resume)
    with restored(module):
        new = walker.go(batches, run)
    options = {"propagate": propagate, "dtype": str(width or "own").removeprefix("torch."), **(settings or {})}
    nodes = {name: new.get(name) or opened.node(name) for name in opened}
    return Weights(nodes, Step("stats.walk", options, (opened.lineage,)), opened.files, opened.metadata)


@dataclass
class _Walker:
    """The settings of a walk, and its loop."""

    filler: Filler
    names: Sequence[str]
    asked: Sequence[Mapping[str, Statistic | None]]
    visit: Visit
    propagate: Propagate
    ask: Forward
    keep: bool = True
    empty: bool = False
    compute: torch.dtype | None = None

    def products(self) -> Any:
        """What the model is run in."""
        if self.compute is None:
            return nullcontext()
        return torch.autocast(self.filler.device.type, self.compute)

    def go(self, batches: Iterable[Batch], run: Run | None) -> dict[str, Any]:
        """Every new tensor, as nodes."""
        arguments = Arguments(self.filler.device)
        done, hidden = (0, None) if run is None else run.reached()
        if done == 0 and hidden is None:
            hidden, calls, masks = self.recorded(batches, arguments, run)
        elif run is not None:
            calls, masks = run.calls(arguments)
        made: dict[str, Any] = {}
        with progress.task("blocks", len(self.names)) as advance:
            advance(done)
            for index in range(done, len(self.names)):
                given = _Inputs(hidden, [call[index] for call in calls], masks, arguments)
                new, hidden = self.visited(index, given, run)
                kept = new if self.keep else {}
                if run is None:
                    made |= {name: Held(value) for name, value in kept.items()}
                else:
                    run.keep(index, kept)
                    run.finished(index + 1, hidden if isinstance(hidden, InFile) else None)
                advance(1)
        return made if run is None else run.kept(len(self.names))

    def recorded(self, batches: Iterable[Batch], arguments: Arguments, run: Run | None) -> tuple[Any, Any, Any]:
        """The inputs of the first block, the calls of all, and which tokens count."""
        hidden = InMemory() if run is None else run.hidden(0)
        calls: list[Any] = []
        masks: list[Tensor | None] = []
        recorder = CallRecorder(self.filler.model, self.names, arguments, self.ask)
        total = len(batches) if isinstance(batches, Sequence) else 0
        with (
            without_cache(self.filler.model),
            self.filler.stem(self.names) as everything,
            progress.task("inputs of the first block", total) as advance,
        ):
            for batch in batches:
                there = on_device(batch, self.filler.device)
                with self.products():
                    first, found = recorder.record(there, everything)
                hidden.append(first)
                calls.append(found)
                mask = there.get("attention_mask") if isinstance(there, Mapping) else None
                masks.append(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
                advance(1)
        arguments.forget()
        if not calls:
            raise Error("walk needs at least one batch of data, got none")
        hidden.close()
        if run is not None and isinstance(hidden, InFile):
            run.keep_calls(arguments, calls, masks)
            run.finished(0, hidden)
        return hidden, calls, masks

    def visited(self, index: int, given: _Inputs, run: Run | None) -> tuple[dict[str, Tensor], Any]:
        """The new tensors of a block, and the inputs of the next."""
        path, last = self.names[index], index + 1 == len(self.names)
        with self.filler.filled(path) as module:
            name = prefix_of(self.filler.model, path, self.filler.named)

            def forward(called: Any, batch: Batch) -> Tensor:
                args, kwargs = given.called(batch)
                with self.products():
                    return first_of(called(*args, **kwargs), name)

            own = self.filler.names(path)
            following: Any = None
            found: dict[str, Weights] = {}
            asked = {key: statistic for key, statistic in self.asked[index].items() if statistic is not None}
            if asked:
                keep = self.propagate == "dense" and not last
                following = self.next_inputs(index, run) if keep else None

                def seen(_: Any, batch: Batch) -> Tensor:
                    output = forward(module, batch)
                    if following is not None:
                        following.append(output)
                    return output

                with progress.silent():
                    found = collect(under(name, module), given, asked, forward=seen)
            new: dict[str, Tensor] = {}
            if own or self.empty:
                parts = Weights(copied({part: self.filler.weights.node(part) for part in own.values()}))
                empty = {key: Weights({}) for key in self.asked[index] if key not in asked}
                block = Block(name, index, len(self.names), module, parts, {**found, **empty}, given, forward)
                new = self.checked(block, self.visit(block))
            if last:
                given.remove()
                return new, None
            if following is None:
                if new and self.propagate == "changed":
                    self.filler.replaced(path, new)
                following = self.next_inputs(index, run)
                for number, batch in enumerate(given):
                    with torch.no_grad():
                        following.append(forward(module, batch))
                    given.drop(number)
            following.close()
            if run is None:
                given.remove()
            return new, following

    def next_inputs(self, index: int, run: Run | None) -> InMemory | InFile:
        return InMemory() if run is None else run.hidden(index + 1)

    def checked(self, block: Block, new: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """New tensors that fit, in the dtype of the weights, on the CPU."""
        unknown = [name for name in new or () if name not in block.weights]
        if unknown:
            raise Error(
                f"the visitor of {block.name} returns {listed(unknown)}, which the block does not have"
                f"{did_you_mean(unknown[0], block.weights)}"
            )
        made: dict[str, Tensor] = {}
        weights = self.filler.weights
        for name, value in (new or {}).items():
            spec = weights.spec(name)
            if tuple(value.shape) != spec.shape:
                raise Error(f"the visitor returns {name} as {list(value.shape)}, and it is {list(spec.shape)}")
            if shared := self.filler.shared(name):
                raise Error(
                    f"{name} is one tensor with {listed(shared)}, so it cannot be changed in {block.name} alone"
                )
            made[name] = value.detach().to("cpu", spec.dtype, copy=True).contiguous()
        return made


class _Inputs(Sequence[Batch]):
    """What a block is given in each batch: mappings that `collect` takes."""

    def __init__(self, hidden: Any, calls: Sequence[Any], masks: Sequence[Tensor | None], arguments: Arguments):
        self._hidden, self._calls, self._masks, self._arguments = hidden, calls, masks, arguments

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        found = {"hidden": self._hidden[index].to(self._arguments.device), "batch": index}
        mask = self._masks[index]
        return found if mask is None else {**found, "attention_mask": mask}

    def called(self, batch: Batch) -> tuple[Any, Any]:
        """The arguments of the block; the hidden state as a copy, which the block may write into."""
        tree = self._arguments.called(self._calls[batch["batch"]], batch["hidden"].clone())
        return tree["args"], tree["kwargs"]

    def drop(self, index: int) -> None:
        self._hidden.drop(index)

    def remove(self) -> None:
        if isinstance(self._hidden, InMemory):
            self._hidden.remove()


def _device(module: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def _asked(
    model: nn.Module, names: Sequence[str], filler: Filler, statistics: Mapping[str, Statistic]
) -> list[dict[str, Statistic | None]]:
    """Which statistics speak of something in each block; an error for one that does in none."""
    found: list[dict[str, Statistic | None]] = []
    problems: dict[str, NoneFits] = {}
    for path in names:
        holder = under(prefix_of(model, path, filler.named), model.get_submodule(path))
        here: dict[str, Statistic | None] = {}
        for key, statistic in statistics.items():
            try:
                statistic.counter(Access(holder, default_forward, default_loss))
                here[key] = statistic
            except NoneFits as error:
                here[key], problems[key] = None, error
        found.append(here)
    for key, problem in problems.items():
        if all(here[key] is None for here in found):
            raise NoneFits(f"in no block: {problem}") from None
    return found


def _mark(
    walker: _Walker, batches: Iterable[Batch], statistics: Mapping[str, Statistic], settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What must be the same for a walk to be continued, as JSON-able data."""
    filler = walker.filler
    own = set(filler.names("").values())
    return {
        "weightsmith": __version__,
        "blocks": list(walker.names),
        "weights": {name: _identity(filler.weights, name) for name in sorted(own)},
        "batches": [_tensors(batch) for batch in batches],
        "statistics": {name: [one.kind, _told(one)] for name, one in statistics.items()},
        "propagate": walker.propagate,
        "dtype": str(filler.dtype),
        "compute": str(walker.compute),
        "settings": _told(dict(settings or {})),
    }


def _identity(weights: Weights, name: str) -> Any:
    node = weights.node(name)
    return digest(node.tensor) if isinstance(node, Held) else _told(node.identity())


def _tensors(batch: Batch) -> Any:
    if isinstance(batch, Tensor):
        return digest(batch)
    if isinstance(batch, Mapping):
        return {str(name): _tensors(value) for name, value in batch.items()}
    return [_tensors(value) for value in batch] if isinstance(batch, list | tuple) else _told(batch)


def _told(value: Any) -> Any:
    """Plain data for a setting; a function is its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, Mapping):
        return {str(name): _told(one) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: _told(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(str(one) for one in value)
    return getattr(value, "__qualname__", None) or (
        str(value) if isinstance(value, torch.dtype) else type(value).__name__
    )
