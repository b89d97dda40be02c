"""What goes into the layers of a model: found once a pass, shared by layers that have one input, summed.

A *measure* says what is wanted of an input (its Gram matrix, its norm); everything else about looking at a model
while it runs is here: which layers, which rows count, which inputs are one and the same, and where the sums live.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.stats.room import Batch, chosen_names, size
from weightsmith.weights import Pattern, as_bytes, matches, working

Layer = nn.Linear | nn.Conv1d | nn.Conv2d

Tokens = Callable[[Batch], Tensor]
"""``batch -> [n, t]`` or ``[n]``: how much each token or example counts, not negative."""

AT_ONCE = 2**23
"""Values of features that are made together: what a convolution unfolds, what is copied into float32."""


class Measure(Protocol):
    """What is gathered of a layer's rows, call by call."""

    sums: torch.dtype
    """Of the totals, at least."""

    def form(self, name: str) -> object:
        """Layers with different forms of the measure do not share it."""
        ...

    def of(self, name: str, parts: Iterable[Part]) -> Tensor:
        """What is found in one call of a layer; at least one part, which may have no rows."""
        ...

    def into(self, total: Tensor, found: Tensor) -> None:
        """Take what one call found into the total, in place. Totals begin with zeros."""
        ...

    def sound(self, found: Tensor) -> Tensor:
        """Whether what was found is of finite inputs: one boolean."""
        ...

    def result(self, total: Tensor, rows: float) -> Tensor:
        """What is told in the end; the total may be overwritten."""
        ...


@dataclass
class Part:
    """Some rows of features ``[r, in]``, in their working dtype, and how much each counts (None: one each)."""

    rows: Tensor
    weights: Tensor | None = None


# Layers


def layers_of(model: nn.Module, pattern: Pattern) -> dict[str, Layer]:
    """Weight name -> layer, for every layer whose inputs say all about its weight."""
    users: dict[int, list[bool]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(_is_layer(module))
    able: dict[str, Layer] = {}
    for name, module in model.named_modules():
        # A weight that several layers use would need the sum over all of them.
        if _is_layer(module) and users.get(id(module.weight)) == [True]:
            able[f"{name}.weight" if name else "weight"] = module  # type: ignore[assignment]
    chosen = {name: layer for name, layer in able.items() if matches(pattern, name)}
    chosen_names(able, list(chosen), pattern)
    return chosen


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def inputs_of(layer: Layer) -> int:
    """Features a row: the inputs of the flattened weight ``[out, in]``."""
    return layer.weight[0].numel()


def features(layer: Layer, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a layer multiplies its flattened weight ``[out, in]`` with.

    Args:
        layer: a linear layer, or a convolution along one or two axes without groups.
        value: what it is given, ``[..., in]`` or ``[n, channels, ...]``.
        mask: ``[n, tokens]``, 0 for padding; its tokens are left out of ``[n, tokens, in]``.

    Returns:
        ``[rows, in]``, float32 or wider: positions, for a convolution patches.

    >>> features(torch.nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    value = working(value)
    if isinstance(layer, nn.Linear):
        if mask is not None and value.dim() == 3 and value.shape[:2] == mask.shape:
            value = value[mask.bool()]
        return value.reshape(-1, layer.in_features)
    flat, value = isinstance(layer, nn.Conv1d), by_row(layer, value)
    how = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    value = functional.pad(value, layer._reversed_padding_repeated_twice, mode=how)
    one: tuple[int, ...] = (1,) if flat else ()
    sizes = ((*one, *setting) for setting in (layer.kernel_size, layer.dilation, layer.stride))
    kernel, dilation, stride = sizes
    patches = functional.unfold(value[:, :, None] if flat else value, kernel, dilation, 0, stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def outputs(layer: Layer, value: Tensor) -> Tensor:
    """What a layer gives (or a gradient of that), a row for each row of its `features`: ``[rows, out]``."""
    if isinstance(layer, nn.Linear):
        return value.reshape(-1, layer.out_features)
    return by_row(layer, value).movedim(1, -1).reshape(-1, layer.out_channels)


def by_row(layer: Layer, value: Tensor) -> Tensor:
    """An input or output of a layer as ``[rows, ...]`` of a linear one, ``[n, ...]`` of a convolution."""
    if isinstance(layer, nn.Linear):
        return value.reshape(-1, value.shape[-1])
    return value[None] if value.dim() == (2 if isinstance(layer, nn.Conv1d) else 3) else value


# Which rows count


@dataclass
class Counted:
    """Which tokens of a batch count, and how much."""

    mask: Tensor | None = None
    """``[n, t]``, 0 for padding."""
    tokens: Tensor | None = None
    """``[n, t]`` or ``[n]``, float."""

    @classmethod
    def of(cls, batch: Batch, tokens: Tokens | None = None) -> Counted:
        """As the batch says (its ``attention_mask``), and as a user's function does."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return cls(mask, None if tokens is None else _checked(tokens, batch))

    def rows(self, name: str, layer: Layer, value: Tensor) -> Tensor | None:
        """How much each row of a linear layer's input counts, or each example of a convolution's; None: all alike.

        Booleans where all that count count the same.
        """
        mask = self._flat(self.mask, layer, value)
        if self.tokens is None:
            return mask
        weights = self._flat(self.tokens, layer, value)
        whole = value if isinstance(layer, nn.Linear) else by_row(layer, value)
        if weights is None and self.tokens.dim() == 1 and whole.shape[:1] == self.tokens.shape:
            each = value[0].numel() // value.shape[-1] if isinstance(layer, nn.Linear) and len(value) else 1
            weights = self.tokens.to(value.device).repeat_interleave(each)
        if weights is None:
            raise Error(
                f"{name}: tokens= {list(self.tokens.shape)} says nothing of the rows of its input {list(value.shape)}; "
                "leave this layer out with pattern=, or give one number for each example [n]"
            )
        return weights if mask is None else weights * mask

    def _flat(self, given: Tensor | None, layer: Layer, value: Tensor) -> Tensor | None:
        """``[n, t]`` as one number a row, where the input is of tokens: ``[n, t, in]`` or ``[n t, in]``."""
        if given is None or given.dim() != 2 or not isinstance(layer, nn.Linear):
            return None
        of_tokens = value.dim() == 3 and value.shape[:2] == given.shape
        if not of_tokens and not (value.dim() == 2 and len(value) == given.numel()):
            return None
        flat = given.reshape(-1).to(value.device)
        return flat != 0 if given is self.mask else flat


def _checked(tokens: Tokens, batch: Batch) -> Tensor:
    with torch.no_grad():
        found = tokens(batch)
    if not isinstance(found, Tensor) or found.dim() not in (1, 2) or len(found) != size(batch):
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise Error(f"tokens= must give [n, t] or [n] for a batch of n = {size(batch)} examples, got {what}")
    found = found.detach().float()
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise Error("tokens= must give finite weights that are not negative")
    return found


def input_parts(layer: Layer, value: Tensor, counts: Tensor | None) -> Iterator[Part]:
    """The features of an input, some rows at a time; rows that count for nothing are left out."""
    for part, some in runs(layer, value, counts):
        if some is None:
            yield Part(features(layer, part))
            continue
        keep = some != 0
        rows = features(layer, part[keep])
        if some.dtype == torch.bool:
            yield Part(rows)
        else:
            weights = some[keep].to(rows.dtype)
            yield Part(rows, weights.repeat_interleave(len(rows) // max(len(weights), 1)))


def runs(layer: Layer, value: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Runs of an input `by_row`, and the same runs of the others.

    There is at least one, and its features are about `AT_ONCE` values at most.
    """
    value = by_row(layer, value)
    each = value[:1].numel() * (1 if isinstance(layer, nn.Linear) else layer.weight[0, 0].numel())
    step = max(AT_ONCE // max(each, 1), 1)
    for start in range(0, max(len(value), 1), step):
        run = slice(start, start + step)
        yield (value[run], *(None if other is None else other[run] for other in others))


def output_parts(layer: Layer, value: Tensor, counts: Tensor | None) -> Iterator[Part]:
    """What a layer gives, some rows at a time; rows that do not count are left out."""
    rows = outputs(layer, value)
    step = max(AT_ONCE // max(rows.shape[1], 1), 1)
    for start in range(0, max(len(rows), 1), step):
        some = rows[start : start + step]
        yield Part(working(some if counts is None else some[counts[start : start + step]]))


# Sums


@dataclass
class Store:
    """Where sums live: in memory up to a size, then in files that vanish with them."""

    folder: str | os.PathLike[str] | None = None
    most: int | None = None
    """Bytes in memory; None for any number."""
    used: int = 0
    files: set[int] = field(default_factory=set)
    """The addresses of sums in files."""

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None, memory: int | str | None) -> Store:
        """As users say it: with a folder and no size, all sums live in files."""
        if folder is not None and not os.path.isdir(folder):
            raise Error(f"store={os.fspath(folder)} is no folder; make it first")
        if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            raise Error(f"store={os.fspath(folder)} cannot be written to; choose another folder")
        most = as_bytes(memory)
        return cls(folder, 0 if most is None and folder is not None else most)

    def zeros(self, found: Tensor, sums: torch.dtype) -> Tensor:
        """A total for what is found: as wide as ``sums`` at least, of zeros."""
        dtype = torch.promote_types(found.dtype, sums)
        if found.device.type == "mps":  # which has no float64
            dtype = torch.float32
        nbytes = found.numel() * dtype.itemsize
        if self.most is None or self.used + nbytes <= self.most:
            self.used += nbytes
            return torch.zeros(found.shape, dtype=dtype, device=found.device)
        return self._mapped(found.shape, dtype)

    def copy(self, total: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy, where the total lives."""
        dtype = dtype or total.dtype
        made = (
            self._mapped(total.shape, dtype)
            if total.data_ptr() in self.files
            else total.new_empty(total.shape, dtype=dtype)
        )
        return made.copy_(total)

    def _mapped(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        nbytes = shape.numel() * dtype.itemsize
        try:
            handle, path = tempfile.mkstemp(prefix="weightsmith-", suffix=".sums", dir=self.folder)
        except OSError as error:
            raise Error(f"store={os.fspath(self.folder or tempfile.gettempdir())}: {error.strerror or error}") from None
        try:
            # Room is taken at once: a full disk would else kill the process when a page is written.
            with suppress(AttributeError):
                os.posix_fallocate(handle, 0, nbytes)
            os.truncate(handle, nbytes)
            made = torch.from_file(path, shared=True, size=nbytes // dtype.itemsize, dtype=dtype)
        except OSError as error:
            raise Error(
                f"{path}: no room for sums of {nbytes:,} bytes: {error.strerror or error}; choose another folder with "
                "store=, fewer layers with pattern=, or sums=torch.float32"
            ) from None
        finally:
            os.close(handle)
            with suppress(PermissionError):  # where files in use cannot be removed, they stay
                os.unlink(path)
        self.files.add(made.data_ptr())
        return made.view(shape)


@dataclass
class _Shared:
    """One total, the rows it rests on, and the layers whose inputs it is of."""

    names: frozenset[str]
    total: Tensor
    rows: float = 0.0


@dataclass
class Taps:
    """A counter of what goes into layers, by a measure. See `weightsmith.stats.Counter`."""

    layers: Mapping[str, Layer]
    measure: Measure
    tokens: Tokens | None = None
    store: Store = field(default_factory=Store)
    of: str = "inputs"
    totals: dict[str, _Shared] = field(default_factory=dict)
    checks: list[tuple[frozenset[str], Tensor]] = field(default_factory=list)
    batches: int = 0

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        one = _Pass(self, Counted.of(batch, self.tokens))
        handles = []
        try:
            for name, layer in self.layers.items():
                if self.of == "inputs":
                    handles.append(layer.register_forward_pre_hook(one.before(name), with_kwargs=True))
                else:
                    handles.append(layer.register_forward_hook(one.after(name)))
            yield
            one.flush()
        finally:
            for handle in handles:
                handle.remove()

    def see(self, batch: Batch) -> None:
        """Everything was seen on the way; what was not finite is found here, at one look a batch."""
        self.batches += 1
        look(self.of, self.checks, self.batches)
        self.checks.clear()

    def add(self, names: frozenset[str], found: Tensor, rows: float) -> None:
        """Add to the total of these layers; one that other layers share is first taken apart."""
        self.checks.append((names, self.measure.sound(found)))
        known = {id(shared): shared for name in names if (shared := self.totals.get(name)) is not None}
        if not known:
            self._share(names, self.store.zeros(found, self.measure.sums))
        elif len(known) > 1 or next(iter(known.values())).names != names:
            self._split(names, known.values(), found)
        alone = self.totals[min(names)].names == names
        for name in [min(names)] if alone else sorted(names):
            shared = self.totals[name]
            self.measure.into(shared.total, found.to(shared.total.device))
            shared.rows += rows

    def _share(self, names: frozenset[str], total: Tensor, rows: float = 0.0) -> None:
        shared = _Shared(names, total, rows)
        self.totals.update(dict.fromkeys(names, shared))

    def _split(self, names: frozenset[str], known: Iterable[_Shared], found: Tensor) -> None:
        for shared in list(known):
            first, *others = sorted(shared.names)
            for name in others:
                self._share(frozenset({name}), self.store.copy(shared.total), shared.rows)
            self._share(frozenset({first}), shared.total, shared.rows)
        for name in names - set(self.totals):
            self._share(frozenset({name}), self.store.zeros(found, self.measure.sums))

    def rows(self) -> dict[str, float]:
        """Layer -> the rows it was given (the sum of their weights); 0 for those that have no result."""
        return {name: self.totals[name].rows if name in self.totals else 0.0 for name in self.layers}

    def result(self) -> dict[str, Tensor]:
        made: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name in self.layers:
            shared = self.totals.get(name)
            if shared is None or not shared.rows:
                continue
            if id(shared) not in made:
                made[id(shared)] = shared.total = self.measure.result(shared.total, shared.rows)  # the old one goes
            found[name] = made[id(shared)]
        return found


def look(of: str, checks: Sequence[tuple[Iterable[str], Tensor]], batch: int) -> None:
    """An error for the first check that failed; a device is waited for once."""
    if not checks:
        return
    device = checks[0][1].device
    for (names, _), sound in zip(checks, torch.stack([one.to(device) for _, one in checks]).tolist(), strict=True):
        if not sound:
            raise not_finite(of, names, batch)


def not_finite(of: str, names: Iterable[str], batch: int) -> Error:
    """The error for inputs that no sum can be made of."""
    return Error(
        f"{min(names)}: its {of} in batch {batch} are not finite, or too large to be squared in float32 (the first "
        "such layer). Look at this batch and at the weights before this layer; models in float16 overflow where they "
        "do not in bfloat16 or float32"
    )


class _Pass:
    """The hooks of one forward pass. Layers that follow one another on one input share what is found of it."""

    def __init__(self, taps: Taps, counted: Counted):
        self.taps, self.counted = taps, counted
        self.key: tuple[Any, ...] | None = None
        self.names: set[str] = set()
        self.found: tuple[Tensor, float] | None = None

    def before(self, name: str) -> Any:
        form = self.taps.measure.form(name)

        def see(layer: Layer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            value = arguments[0] if arguments else keywords["input"]
            key = (version(value), form, _form(layer))
            same = self.key is not None and self.key[0]() is value and self.key[1:] == key
            if not same or name in self.names:  # a layer that is called twice counts twice
                self.flush()
                with apart(value):
                    counts = self.counted.rows(name, layer, value)
                    self.key = (weakref.ref(value), *key)  # which keeps no input alive
                    self.found = self._of(name, input_parts(layer, value.detach(), counts))
            self.names.add(name)

        return see

    def after(self, name: str) -> Any:
        def see(layer: Layer, arguments: tuple[Any, ...], value: Tensor) -> None:
            with apart(value):
                counts = self.counted.rows(name, layer, value)
                found = self._of(name, output_parts(layer, value.detach(), counts))
                self.taps.add(frozenset({name}), *found)

        return see

    def _of(self, name: str, parts: Iterable[Part]) -> tuple[Tensor, float]:
        rows = 0.0

        def counting() -> Iterator[Part]:
            nonlocal rows
            for part in parts:
                rows += len(part.rows) if part.weights is None else float(part.weights.sum(dtype=torch.float32))
                yield part

        return self.taps.measure.of(name, counting()), rows

    def flush(self) -> None:
        """Hand over what is waiting."""
        if self.found is not None:
            with apart(self.found[0]):
                self.taps.add(frozenset(self.names), *self.found)
        self.key, self.found = None, None
        self.names = set()


def version(value: Tensor) -> object:
    """Changes when a tensor is written to."""
    return object() if value.is_inference() else value._version  # what keeps no count is never the same


def _form(layer: Layer) -> tuple[Any, ...]:
    """What of a layer decides which features it makes of its input."""
    if isinstance(layer, nn.Linear):
        return ()
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)


@contextmanager
def apart(value: Tensor) -> Iterator[None]:
    """Computing of our own while the model runs: without a graph, as wide as the factors, on tensors that stay."""
    kind = value.device.type
    narrow = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), narrow:
        yield
