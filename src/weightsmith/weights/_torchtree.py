"""From what a PyTorch file describes to names and nodes, believing none of it.

The tree is walked without recursion and within a budget, because its shape is the file's choice:
parts may be shared so often that written out they would not fit in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from weightsmith.errors import Error, FormatError, did_you_mean, listed
from weightsmith.weights._files import Bytes
from weightsmith.weights._lazy import Held, Lazy
from weightsmith.weights._pickle import DEEPEST, Name, Opaque
from weightsmith.weights._spec import Spec
from weightsmith.weights._strided import strided
from weightsmith.weights._torchdata import META, Array, Storage, View, lengths, shown

LONGEST_TEXT = 4096
"""Bytes; longer texts are no settings and stay out of the metadata."""

MOST_METADATA = 10_000
LARGEST_METADATA = 2**22
LARGEST_TENSOR = 2**40
LARGEST_EXPANSION = 2**34
"""Elements that a tensor may have when its storage has fewer, because a stride is 0."""

OPAQUE = "weightsmith.opaque"
"""Metadata: a JSON object, from dotted path to class, of what was left uninterpreted."""

BARE = "tensor"
"""What a file that holds a tensor and no dictionary calls it."""


def selected(file: Bytes, tree: Any, at: str) -> Any:
    """The part of the tree at a path. Keys may have dots themselves, so every way to cut it is tried."""
    path = at.replace("/", ".").strip(".")
    if not path:
        return tree
    todo, nearest = [(tree, path)], tree
    for _ in range(10_000):
        if not todo:
            break
        node, rest = todo.pop()
        nearest = node
        for name, child in _children(node) or ():
            word = name.replace("/", ".")
            if word == rest:
                if _children(child) is None:
                    raise Error(f"{file.name}: {at!r} is no dictionary but {_described(child)}")
                return child
            if rest.startswith(word + "."):
                todo.append((child, rest[len(word) + 1 :]))
    known = [name for name, child in _children(nearest) or () if _children(child) is not None]
    known = known or [name for name, child in _children(tree) or () if _children(child) is not None]
    there = f"it has {listed(word[:60] for word in known)}" if known else "it has no dictionaries inside"
    raise Error(f"{file.name}: nothing at {at!r}{did_you_mean(path.rpartition('.')[2], known[:1000])}; {there}")


def _described(value: Any) -> str:
    return "a tensor" if isinstance(value, View | Array | Storage) else f"a {type(value).__name__}"


def _children(value: Any) -> Iterator[tuple[str, Any]] | None:
    """What lies inside, by the word that it adds to the path; None for what has no inside."""
    if isinstance(value, dict):
        return ((_word(key), child) for key, child in value.items())
    if isinstance(value, list | tuple):
        return ((str(index), child) for index, child in enumerate(value))
    if isinstance(value, Opaque):
        return _attributes(value)
    return None


def _word(key: Any) -> str:
    if isinstance(key, str):
        return key
    return f"<{key.name}>" if isinstance(key, Opaque) else str(key)


def _attributes(value: Opaque) -> Iterator[tuple[str, Any]]:
    """The attributes and entries of an object that was not made; of a module what state_dict() has."""
    states = value.state if isinstance(value.state, tuple) else (value.state,)
    for state in states:
        if isinstance(state, dict):
            yield from _module(state) if "_parameters" in state and "_modules" in state else _children(state) or ()
    yield from ((_word(key), child) for key, child in value.entries.items())
    yield from ((str(index), child) for index, child in enumerate(value.elements))


def _module(state: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    passing = state.get("_non_persistent_buffers_set") or ()
    passing = {name for name in passing if isinstance(name, str)} if isinstance(passing, list | tuple) else set()
    for kind in ("_parameters", "_buffers", "_modules"):
        members = state.get(kind)
        for name, child in members.items() if isinstance(members, dict) else ():
            yield _word(name), None if kind == "_buffers" and name in passing else child
    yield from ((name, None) for name in passing)  # so that the work done for them is counted


class Flat:
    """Names for everything in a tree, and nodes for its tensors."""

    def __init__(self, file: Bytes, budget: int):
        self.file, self.budget = file, budget
        self.nodes: dict[str, Lazy] = {}
        self.metadata: dict[str, str] = {}
        self.opaque: dict[str, str] = {}
        self.written = 0
        self._made: dict[object, Lazy] = {}
        self._arrays: list[Array] = []  # held, so that no other object gets the identity of one of them

    def walk(self, tree: Any) -> None:
        """Depth first, without recursion: how deep a file nests is not for it to choose."""
        if (leaf := _children(tree)) is None:
            self.leaf(BARE, tree)
            return
        self.inspect("", tree)
        path: list[tuple[str, Iterator[tuple[str, Any]], int]] = [("", leaf, id(tree))]
        above = {id(tree)}
        while path:
            prefix, rest, _ = path[-1]
            word, child = next(rest, (None, None))
            if word is None:
                above.discard(path.pop()[2])
                continue
            self.spend(16)
            if child is None or (self.full and isinstance(child, bool | int | float | str)):
                continue
            name = f"{prefix}{word}"
            self.spend(len(name))
            if (inside := _children(child)) is None:
                self.leaf(name, child)
                continue
            if id(child) in above:
                raise FormatError(f"{self.file.name}: {name[:200]!r} contains itself")
            if len(path) >= DEEPEST:
                raise FormatError(f"{self.file.name}: nests more than {DEEPEST} levels deep, at {name[:200]!r}")
            self.inspect(name, child)
            path.append((f"{name}.", inside, id(child)))
            above.add(id(child))

    def spend(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise FormatError(f"{self.file.name}: repeats its parts so often that they would not fit in memory")

    @property
    def full(self) -> bool:
        return len(self.metadata) >= MOST_METADATA or self.written > LARGEST_METADATA

    def inspect(self, name: str, value: Any) -> None:
        """Remember what class an object would have had. Tensors that only that class can rebuild are refused."""
        if not isinstance(value, Opaque):
            return
        states = value.state if isinstance(value.state, tuple) else (value.state,)
        hidden = [value.arguments, *(state for state in states if not isinstance(state, dict))]
        if self.holds_tensors(hidden):
            raise FormatError(
                f"{self.file.name}: {name[:200] or 'the whole file'!r} is made by {value.name}, which cannot be "
                "read without running its code; save its state_dict() instead, with plain tensors"
            )
        self.note(name, str(value.name))

    def note(self, name: str, kind: str) -> None:
        if len(self.opaque) < MOST_METADATA and self.written <= LARGEST_METADATA:
            self.written += len(name) + len(kind)
            self.opaque[name] = kind

    def holds_tensors(self, value: Any) -> bool:
        todo, seen = [value], set()
        while todo:
            item = todo.pop()
            if isinstance(item, View | Storage | Array):
                return True
            if id(item) in seen:
                continue
            seen.add(id(item))
            self.spend(16)
            if isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, list | tuple):
                todo += item
            elif isinstance(item, Opaque):
                todo += [item.arguments, item.state, item.entries, item.elements]
        return False

    def leaf(self, name: str, value: Any) -> None:
        if isinstance(value, View | Storage | Array):
            self.nodes[self.unused(name)] = self.node(name, value)
        elif isinstance(value, Name):
            self.note(name, str(value))
        elif isinstance(value, bool | int | float | str) and not self.full:
            self.describe(self.unused(name), value)

    def unused(self, name: str) -> str:
        if name in self.nodes or name in self.metadata:
            raise FormatError(f"{self.file.name}: two things in it would be called {name[:200]!r}")
        return name

    def describe(self, name: str, value: bool | int | float | str) -> None:
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            return
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no word for it
        words = json.dumps(value)
        self.metadata[name] = words
        self.written += len(name) + len(words)

    def node(self, name: str, value: View | Storage | Array) -> Lazy:
        where = f"{self.file.name}: tensor {name[:200]!r}"
        if isinstance(value, Array):
            if id(value) not in self._made:
                # Many arrays can be made of the same bytes, and each is a copy.
                self.spend(0 if value.values is None else 8 * value.values.nbytes)
                if (tensor := value.tensor()) is None:
                    raise FormatError(f"{where} is {value.reason}")
                self._made[id(value)] = Held(tensor)
                self._arrays.append(value)
            return self._made[id(value)]
        if isinstance(value, Storage):
            value = View(value, 0, (value.nbytes // value.dtype.itemsize,), (1,))
        storage, offset, spec, stride = _checked(where, value)
        same = (storage.offset, offset, spec, stride)
        if same not in self._made:
            self._made[same] = strided(self.file, storage.offset + offset * spec.dtype.itemsize, spec, stride)
        return self._made[same]


def _checked(where: str, view: View) -> tuple[Storage, int, Spec, tuple[int, ...]]:
    """What a view claims, once it is known that it stays inside its storage."""
    storage, size, stride = view.storage, lengths(view.size), lengths(view.stride)
    if not isinstance(storage, Storage) or size is None or stride is None or len(size) != len(stride):
        raise FormatError(f"{where} has no valid storage, size or strides")
    if storage is META:
        raise FormatError(f"{where} is on the meta device: it has no values")
    if storage.offset < 0:
        raise FormatError(f"{where}: truncated: the storage {storage.key[:80]!r} is not in the file")
    if lengths((view.offset,)) is None:
        raise FormatError(f"{where} has no valid offset in its storage")
    if isinstance(view.metadata, dict) and (view.metadata.get("conj") or view.metadata.get("neg")):
        raise FormatError(f"{where} is yet to be conjugated or negated; save it after resolve_conj().resolve_neg()")
    spec = Spec(size, storage.dtype if view.dtype is None else _tensor_dtype(where, view.dtype))
    if math.prod(max(n, 1) for n in size) > LARGEST_TENSOR:
        raise FormatError(f"{where} claims the shape {list(size)}, which no tensor has")
    if spec.numel:
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if (view.offset + last + 1) * spec.dtype.itemsize > storage.nbytes:
            raise FormatError(
                f"{where}: size {list(size)} and strides {list(stride)} from {view.offset} on reach beyond "
                f"the storage {storage.key[:80]!r} of {storage.nbytes} bytes"
            )
        if spec.nbytes > storage.nbytes and spec.numel > LARGEST_EXPANSION:
            raise FormatError(f"{where} repeats {storage.nbytes} bytes to {spec.nbytes}")
    return storage, view.offset, spec, stride


def _tensor_dtype(where: str, name: Any) -> torch.dtype:
    known = getattr(torch, name.qualname, None) if isinstance(name, Name) and name.module == "torch" else None
    if not isinstance(known, torch.dtype):
        raise FormatError(f"{where} has the dtype {shown(name)}, which this version of PyTorch does not have")
    return known
