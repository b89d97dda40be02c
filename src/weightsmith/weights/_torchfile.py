"""PyTorch's own files, opened without running anything that is in them.

``torch.save`` writes a pickle, which says what the tensors are called and how they are cut out of
storages, and the storages, raw. The pickle is interpreted as data (see `_pickle`); the tensors are
then ranges of the file, so opening a checkpoint of any size reads its headers only. Both layouts
are known: the zip of PyTorch 1.6 and later, and the stream of pickles before it.

What cannot be read so is refused with its name, never left out: a tensor that only its own class
can rebuild. Objects without tensors (settings, callbacks) do not hinder; their classes are listed
in the metadata under `OPAQUE`.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, _utils

from weightsmith.errors import Error, FormatError, did_you_mean, listed
from weightsmith.weights import _pickle
from weightsmith.weights._files import Bytes, read_bytes
from weightsmith.weights._layout import Contents, Layout
from weightsmith.weights._lazy import Held, Lazy, Scratch, Stored, as_buffer
from weightsmith.weights._pickle import DEEPEST, Buildable, Name, Opaque
from weightsmith.weights._spec import Spec
from weightsmith.weights._zip import Archive, Part, plan

LARGEST_PICKLE = 2**28
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

_MAGIC = 0x1950A86A20F9469CFC6C  # the first number of the legacy format
_BIG_ENDIAN = "was written on a big-endian machine; load it with torch.load and save it again"
_WORDS = "extra/weightsmith.json"

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
}
# Raw codes: known here so that a quantized tensor is refused by its own name.
_CODES = {"QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32}


def read(file: Bytes, at: str | None = None) -> Contents:
    """The tensors of one ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file, without reading any.

    Nested dictionaries, lists and modules become dotted names, as ``state_dict()`` would name them.
    Tensors that are the same part of the same storage share a node.

    Args:
        file: the file.
        at: a path of keys, with dots or slashes between them; what lies there alone is read, and
            names begin after it.

    Returns:
        Nodes by name; numbers and short texts beside them are metadata, as JSON, under their paths.

    Raises:
        FormatError: the file is damaged, lying, or holds tensors that only its own code can rebuild.
        Error: there is nothing at ``at``.
    """
    head = read_bytes(file, 0, min(file.size, 512))
    if head.startswith(b"PK"):
        opened = _open_zip(file)
    elif head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head[:32]:
        opened = _open_legacy(file)
    else:
        raise FormatError(f"{file.name}: {_foreign(head)}")
    tree = opened.tree if at is None else _selected(file, opened.tree, at)
    found = _Flat(file, opened.budget)
    found.walk(tree)
    if found.opaque:
        found.metadata[OPAQUE] = json.dumps(found.opaque)
    return Contents(found.nodes, opened.words | found.metadata)


def _foreign(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "is a tar archive as PyTorch wrote before version 0.2; load it with an old PyTorch and save it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file that it stands for; fetch that with: git lfs pull"
    if head[:1] == b"\x80":
        return "is a pickle, but none that torch.save wrote"
    return "is no PyTorch file: it is empty" if not head else f"is no PyTorch file: it begins with {head[:8]!r}"


# What the pickles hold


@dataclass(eq=False)
class _Storage:
    """Raw values in the file. In the legacy format its place is known only after the pickles."""

    key: str
    dtype: torch.dtype
    offset: int = -1
    nbytes: int = 0


_META = _Storage("meta", torch.uint8)
"""Stands for the storage of a tensor that has none."""


@dataclass(eq=False)
class _View:
    """A tensor as the pickle describes it, not yet believed."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: Any = None
    metadata: Any = None


@dataclass(eq=False)
class _Opened:
    tree: Any
    budget: int
    words: dict[str, str] = field(default_factory=dict)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _View:
    return _View(storage, offset, size, stride, None, rest[2] if len(rest) > 2 else None)


def _rebuild_typed(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> _View:
    return _View(storage, offset, size, stride, dtype, metadata)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    """A tensor of a subclass, or with attributes: its values are those of the tensor inside."""
    known = _TENSORS.get(str(function)) if isinstance(function, Name) else None
    if known is None or not isinstance(arguments, tuple):
        return Opaque(function if isinstance(function, Name) else Name("builtins", "object"), (arguments, state))
    return known(*arguments)


def _rebuild_meta(dtype: Any, size: Any, stride: Any, grad: Any = None) -> _View:
    return _View(_META, 0, size, stride, dtype)


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta,
    "torch.nn.parameter.Parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
}


class _Dtype(Buildable):
    """numpy's dtype, in the making."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *rest: Any):
        self.code, self.order = code, "<"

    def build(self, state: Any) -> None:
        if not isinstance(state[1], str):
            raise TypeError("no byte order")
        self.order = state[1]

    def plain(self) -> np.dtype[Any] | None:
        """The dtype, if it is of numbers."""
        simple = isinstance(self.code, str) and len(self.code) <= 3 and self.code[:1] in tuple("biufc")
        return np.dtype(self.code).newbyteorder(cast(Any, self.order)) if simple else None


class _Array(Buildable):
    """numpy's array, in the making."""

    __slots__ = ("reason", "values")

    def __init__(self, *_: Any):
        self.values: np.ndarray[Any, Any] | None = None
        self.reason = "a numpy array of a dtype that PyTorch has not"

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any) -> None:
        plain = dtype.plain() if isinstance(dtype, _Dtype) else None
        if isinstance(raw, str):  # bytes of Python 2 that happened to be text
            raw = raw.encode()
        if plain is None or not isinstance(raw, bytes):
            self.reason = "a numpy array of objects or texts"
            return
        lengths = _lengths(shape)
        if lengths is None or math.prod(lengths) * plain.itemsize != len(raw):
            raise ValueError("its shape and its bytes do not fit")
        self.values = np.frombuffer(raw, plain).reshape(lengths, order="F" if order == "F" else "C")

    def tensor(self) -> Tensor | None:
        if self.values is None:
            return None
        little = self.values.astype(self.values.dtype.newbyteorder("="), copy=True)
        try:
            return torch.from_numpy(little)
        except TypeError:  # a dtype of numpy's own, such as float128
            return None


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any = "C", *rest: Any) -> _Array:
    made = _Array()
    made.fill(raw, dtype, shape, order)
    return made


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    plain = dtype.plain() if isinstance(dtype, _Dtype) else None
    if plain is None or not isinstance(raw, bytes) or len(raw) != plain.itemsize:
        return Opaque(Name("numpy", "generic"), ())
    return np.frombuffer(raw, plain)[0].item()


def _device(kind: Any, index: Any = None) -> str:
    return _shown(kind) if index is None else f"{_shown(kind)}:{_shown(index)}"


_CALLS: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._tensor._rebuild_from_type": lambda function, kind, arguments, *rest: _rebuild_from_type(
        function, kind, arguments
    ),
    "torch.Size": lambda lengths=(): lengths,
    "torch.device": _device,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{package}.{name}": call
        for package in ("core", "_core")
        for name, call in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}


def _lengths(value: Any) -> tuple[int, ...] | None:
    """A shape or strides, if it is one."""
    if not isinstance(value, tuple | list) or len(value) > 64:
        return None
    plain = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    return tuple(value) if plain else None


def _storage_dtype(file: Bytes, kind: Any) -> torch.dtype:
    torch_own = isinstance(kind, Name) and kind.module.partition(".")[0] == "torch"
    known = (_STORAGES | _CODES).get(kind.qualname) if torch_own else None
    if known is None:
        raise FormatError(f"{file.name}: a storage of the kind {_shown(kind)} needs its own code to be read")
    return known


def _shown(value: Any) -> str:
    """A value for a message. What nests is not written out: shared parts can make it endless."""
    return str(value)[:80] if isinstance(value, Name | str | int) else type(value).__name__


# The zip format


def _open_zip(file: Bytes) -> _Opened:
    archive = Archive(file)
    first = next(iter(archive.members), "")
    folder = first.partition("/")[0]
    if f"{folder}/data.pkl" not in archive.members:
        raise FormatError(f"{file.name}: is a zip archive, but no PyTorch file: it has no {folder}/data.pkl")
    if f"{folder}/constants.pkl" in archive.members:
        raise FormatError(
            f"{file.name}: holds a TorchScript program; open it with torch.jit.load and save its state_dict()"
        )
    if _small_member(archive, f"{folder}/byteorder", "little") != "little":
        raise FormatError(f"{file.name}: {_BIG_ENDIAN}")
    start, size = archive.stored(f"{folder}/data.pkl")
    if size > LARGEST_PICKLE:
        raise FormatError(f"{file.name}: its pickle has {size} bytes; at most {LARGEST_PICKLE} are read")
    storages: dict[tuple[str, torch.dtype], _Storage] = {}

    def persistent(identity: Any) -> _Storage:
        kind, key, _ = _storage_id(file, identity)
        dtype = _storage_dtype(file, kind)
        if (key, dtype) not in storages:
            storages[key, dtype] = _Storage(key, dtype, *archive.stored(f"{folder}/data/{key}"))
        return storages[key, dtype]

    loaded = _pickle.load(file, start, start + size, _CALLS, persistent)
    return _Opened(loaded.value, _budget(size), _words(file, _small_member(archive, f"{folder}/{_WORDS}", "{}", 2**24)))


def _small_member(archive: Archive, name: str, otherwise: str, most: int = 64) -> str:
    if name not in archive.members:
        return otherwise
    start, size = archive.stored(name)
    if size > most:
        raise FormatError(f"{archive.file.name}: member {name!r} has {size} bytes; at most {most} are read")
    return read_bytes(archive.file, start, size).decode("utf-8", "replace")


def _words(file: Bytes, text: str) -> dict[str, str]:
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, dict) or not all(isinstance(value, str) for value in words.values()):
        raise FormatError(f"{file.name}: member {_WORDS!r} must map words to words")
    return words


def _storage_id(file: Bytes, identity: Any) -> tuple[Any, str, tuple[Any, ...]]:
    if isinstance(identity, tuple) and len(identity) >= 5 and identity[0] in ("storage", b"storage"):
        key = identity[2].decode("ascii", "replace") if isinstance(identity[2], bytes) else identity[2]
        if isinstance(key, str):
            return identity[1], key, identity[3:]
    raise FormatError(f"{file.name}: refers to something outside its pickle that is no storage")


def _budget(pickled: int) -> int:
    """How much may come of walking what a pickle of that many bytes describes: shared parts count each time."""
    return 2**21 + 64 * pickled


# The legacy format


def _open_legacy(file: Bytes) -> _Opened:
    stop = min(file.size, LARGEST_PICKLE)
    storages: dict[str, _Storage] = {}
    views: list[tuple[_Storage, _Storage, int, int]] = []

    def persistent(identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] in ("module", b"module"):
            return identity[1]
        kind, key, (_, _, *view) = _storage_id(file, identity)
        dtype = _storage_dtype(file, kind)
        root = storages.setdefault(key, _Storage(key, dtype))
        if not view or view[0] is None:
            return root
        _, start, length = _checked_view(file, view[0])
        views.append((root, _Storage(key, dtype), start, length))
        return views[-1][1]

    magic = _pickle.load(file, 0, stop)
    version = _pickle.load(file, magic.end, stop)
    system = _pickle.load(file, version.end, stop)
    if magic.value != _MAGIC or not isinstance(version.value, int) or version.value != 1001:
        raise FormatError(f"{file.name}: is of a version of PyTorch's legacy format that is not known")
    if isinstance(system.value, dict) and system.value.get("little_endian") is False:
        raise FormatError(f"{file.name}: {_BIG_ENDIAN}")
    loaded = _pickle.load(file, system.end, stop, _CALLS, persistent)
    keys = _pickle.load(file, loaded.end, stop)
    _place_storages(file, storages, keys.value, keys.end)
    for root, view, start, length in views:
        if root.offset < 0 or (start + length) * root.dtype.itemsize > root.nbytes:
            raise FormatError(f"{file.name}: a view reaches beyond the storage {root.key!r}")
        view.offset = root.offset + start * root.dtype.itemsize
        view.nbytes = length * root.dtype.itemsize
    return _Opened(loaded.value, _budget(loaded.end - system.end))


def _checked_view(file: Bytes, view: Any) -> tuple[Any, int, int]:
    if not isinstance(view, tuple) or len(view) != 3 or _lengths(view[1:]) is None:
        raise FormatError(f"{file.name}: a view of a storage is none")
    return view


def _place_storages(file: Bytes, storages: dict[str, _Storage], keys: Any, position: int) -> None:
    """The storages follow in the order of the keys, each after its number of elements."""
    if not isinstance(keys, list):
        raise FormatError(f"{file.name}: has no list of its storages")
    for key in keys:
        key = key.decode("ascii", "replace") if isinstance(key, bytes) else key
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.offset >= 0:
            raise FormatError(f"{file.name}: lists a storage that no tensor uses, or one twice")
        if position + 8 > file.size:
            raise FormatError(f"{file.name}: truncated: ends before the storage {storage.key!r}")
        count = int.from_bytes(read_bytes(file, position, 8), "little")
        storage.offset, storage.nbytes = position + 8, count * storage.dtype.itemsize
        position = storage.offset + storage.nbytes
        if position > file.size:
            raise FormatError(
                f"{file.name}: truncated: the storage {storage.key!r} needs {storage.nbytes} bytes, "
                f"{file.size - storage.offset} are left"
            )


# From tree to names


def _selected(file: Bytes, tree: Any, at: str) -> Any:
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
    return "a tensor" if isinstance(value, _View | _Array | _Storage) else f"a {type(value).__name__}"


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


class _Flat:
    """Names for everything in a tree, and nodes for its tensors."""

    def __init__(self, file: Bytes, budget: int):
        self.file, self.budget = file, budget
        self.nodes: dict[str, Lazy] = {}
        self.metadata: dict[str, str] = {}
        self.opaque: dict[str, str] = {}
        self.written = 0
        self._made: dict[object, Lazy] = {}
        self._arrays: list[_Array] = []  # held, so that no other object gets the identity of one of them

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
            if isinstance(item, _View | _Storage | _Array):
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
        if isinstance(value, _View | _Storage | _Array):
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

    def node(self, name: str, value: _View | _Storage | _Array) -> Lazy:
        where = f"{self.file.name}: tensor {name[:200]!r}"
        if isinstance(value, _Array):
            if id(value) not in self._made:
                # Many arrays can be made of the same bytes, and each is a copy.
                self.spend(0 if value.values is None else 8 * value.values.nbytes)
                if (tensor := value.tensor()) is None:
                    raise FormatError(f"{where} is {value.reason}")
                self._made[id(value)] = Held(tensor)
                self._arrays.append(value)
            return self._made[id(value)]
        if isinstance(value, _Storage):
            value = _View(value, 0, (value.nbytes // value.dtype.itemsize,), (1,))
        storage, offset, spec, stride = _checked(where, value)
        same = (storage.offset, offset, spec, stride)
        if same not in self._made:
            self._made[same] = strided(self.file, storage.offset + offset * spec.dtype.itemsize, spec, stride)
        return self._made[same]


def _checked(where: str, view: _View) -> tuple[_Storage, int, Spec, tuple[int, ...]]:
    """What a view claims, once it is known that it stays inside its storage."""
    storage, size, stride = view.storage, _lengths(view.size), _lengths(view.stride)
    if not isinstance(storage, _Storage) or size is None or stride is None or len(size) != len(stride):
        raise FormatError(f"{where} has no valid storage, size or strides")
    if storage is _META:
        raise FormatError(f"{where} is on the meta device: it has no values")
    if storage.offset < 0:
        raise FormatError(f"{where}: truncated: the storage {storage.key[:80]!r} is not in the file")
    if _lengths((view.offset,)) is None:
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
        raise FormatError(f"{where} has the dtype {_shown(name)}, which this version of PyTorch does not have")
    return known


# Tensors whose values do not lie one after another


def strided(file: Bytes, offset: int, spec: Spec, stride: tuple[int, ...]) -> Lazy:
    """A node for values at an offset, ``stride`` elements apart along each axis."""
    expected = 1
    for length, step in zip(reversed(spec.shape), reversed(stride), strict=True):
        if length != 1:
            if step != expected and spec.numel:
                return Strided(file, offset, spec, stride)
            expected *= length
    return Stored(file, offset, spec)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype of each width whose values can be gathered: not all of the narrow ones can."""


class Strided:
    """Values with gaps, repetitions or another order of axes: a transposed, sliced or expanded tensor.

    Rows (indices of the first axis) are read one by one where each is a short run of the file. Where
    a row is scattered over the tensor, as in a transposed matrix, the tensor is read whole: row by
    row it would be read as often as it has rows.
    """

    SCATTERED = 4
    """A row is scattered when the run that holds it is this many times as long."""
    RUN = 2**18
    """Elements read at once of a tensor whose rows are far apart."""

    def __init__(self, file: Bytes, offset: int, spec: Spec, stride: tuple[int, ...]):
        self.file, self.offset, self.spec, self.stride = file, offset, spec, stride
        row = spec.numel // spec.shape[0]
        self.by_row = _span(spec.shape[1:], stride[1:]) <= self.SCATTERED * row
        self.grain = row if self.by_row else spec.numel

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=self.spec.dtype)
        row = self.spec.numel // self.spec.shape[0]
        first, last = start // row, -(-stop // row)
        shape = (last - first, *self.spec.shape[1:])
        if not self.by_row or _span(shape, self.stride) <= self.SCATTERED * (stop - start):
            return self._run(first, shape).reshape(-1).view(self.spec.dtype)
        # Rows far apart are read some at a time, so that the gaps between them need not fit in memory.
        values = scratch.take(stop - start, self.spec.dtype).view(_BITS[self.spec.dtype.itemsize]).view(shape)
        step = max(self.RUN // self.stride[0], 1)
        for index in range(0, last - first, step):
            some = min(step, last - first - index)
            values[index : index + some] = self._run(first + index, (some, *self.spec.shape[1:]))
        return values.view(-1).view(self.spec.dtype)

    def _run(self, first: int, shape: tuple[int, ...]) -> Tensor:
        """Rows from ``first`` on, as a view of the shortest run of the file that holds them."""
        itemsize = self.spec.dtype.itemsize
        run = torch.empty(_span(shape, self.stride), dtype=_BITS[itemsize])
        self.file.read_into(self.offset + first * self.stride[0] * itemsize, as_buffer(run))
        return run.as_strided(shape, self.stride)

    def inputs(self) -> tuple[Lazy, ...]:
        return ()

    def identity(self) -> object:
        return [self.file.identity(), self.offset, str(self.spec), list(self.stride)]


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first value to the last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


# Writing

_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items() if not name.endswith("UntypedStorage")}


class _Raw:
    """Stands for a storage in the pickle that is written."""

    def __init__(self, key: str, spec: Spec):
        self.key, self.spec = key, spec


class _Reference:
    """Stands for a tensor in the pickle that is written."""

    def __init__(self, key: str, spec: Spec):
        self.spec, self.raw = spec, _Raw(key, spec)


class _Pickler(pickle.Pickler):
    """Writes references as torch.save writes tensors."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Raw):
            return None
        name = _STORAGE_NAMES.get(obj.spec.dtype)
        if name is None:
            return ("storage", torch.UntypedStorage, obj.key, "cpu", obj.spec.nbytes)
        return ("storage", getattr(torch, name), obj.key, "cpu", obj.spec.numel)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Reference):
            return NotImplemented
        shape, dtype = obj.spec.shape, obj.spec.dtype
        strides = tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))
        common = (obj.raw, 0, shape, strides, False, {})
        if dtype in _STORAGE_NAMES:
            return _utils._rebuild_tensor_v2, common
        return _utils._rebuild_tensor_v3, (*common, dtype)


def layout(
    specs: Mapping[str, Spec],
    ties: Mapping[str, str],
    metadata: Mapping[str, str],
    name: str,
    names: Sequence[str] | None = None,
) -> Layout:
    """One file that ``torch.load`` reads as a dictionary of tensors, also with ``mmap=True``.

    Args:
        specs: canonical name -> spec.
        ties: alias -> canonical name. Both names are in the dictionary, for one tensor.
        metadata: words, kept in a member of the archive that ``torch.load`` passes over.
        name: of the file.
        names: all names, in the order of the dictionary; canonical names first where left out.

    Raises:
        Error: an alias of an unknown tensor, or a name that is missing or stands twice.
    """
    order = list(names) if names is not None else [*specs, *ties]
    if sorted(order) != sorted([*specs, *ties]):
        raise Error(f"{name}: the order must name each of {len(specs)} tensors and {len(ties)} aliases once")
    unknown = [target for target in ties.values() if target not in specs]
    if unknown:
        raise Error(f"{name}: tied to the unknown tensor {unknown[0]}{did_you_mean(unknown[0], specs)}")
    references = {tensor: _Reference(str(number), spec) for number, (tensor, spec) in enumerate(specs.items())}
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump({tensor: references[ties.get(tensor, tensor)] for tensor in order})
    parts = {
        "archive/data.pkl": Part(stream.getvalue()),
        "archive/byteorder": Part(b"little"),
        "archive/version": Part(b"3\n"),
    }
    if metadata:
        parts[f"archive/{_WORDS}"] = Part(json.dumps(dict(metadata)).encode())
    data = {tensor: f"archive/data/{reference.raw.key}" for tensor, reference in references.items()}
    parts |= {member: Part(b"", specs[tensor].nbytes) for tensor, member in data.items()}
    file, offsets, finish = plan(name, parts)
    return Layout([file], {tensor: (0, offsets[member]) for tensor, member in data.items()}, finish=finish)
