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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import _utils

from weightsmith.errors import Error, FormatError, did_you_mean
from weightsmith.weights import _pickle
from weightsmith.weights._files import Bytes, read_bytes
from weightsmith.weights._layout import Contents, Layout
from weightsmith.weights._spec import Spec
from weightsmith.weights._torchdata import CALLS, STORAGES, Storage, lengths, storage_dtype
from weightsmith.weights._torchtree import OPAQUE, Flat, selected
from weightsmith.weights._zip import Archive, Part, plan

LARGEST_PICKLE = 2**28
_MAGIC = 0x1950A86A20F9469CFC6C  # the first number of the legacy format
_BIG_ENDIAN = "was written on a big-endian machine; load it with torch.load and save it again"
_WORDS = "extra/weightsmith.json"


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
    tree = opened.tree if at is None else selected(file, opened.tree, at)
    found = Flat(file, opened.budget)
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


@dataclass(eq=False)
class _Opened:
    tree: Any
    budget: int
    words: dict[str, str] = field(default_factory=dict)


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
    storages: dict[tuple[str, torch.dtype], Storage] = {}

    def persistent(identity: Any) -> Storage:
        kind, key, _ = _storage_id(file, identity)
        dtype = storage_dtype(file, kind)
        if (key, dtype) not in storages:
            storages[key, dtype] = Storage(key, dtype, *archive.stored(f"{folder}/data/{key}"))
        return storages[key, dtype]

    loaded = _pickle.load(file, start, start + size, CALLS, persistent)
    return _Opened(
        loaded.value, budget_of(size), _words(file, _small_member(archive, f"{folder}/{_WORDS}", "{}", 2**24))
    )


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


def budget_of(pickled: int) -> int:
    """How much may come of walking what a pickle of that many bytes describes: shared parts count each time."""
    return 2**21 + 64 * pickled


# The legacy format


def _open_legacy(file: Bytes) -> _Opened:
    stop = min(file.size, LARGEST_PICKLE)
    storages: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int, int]] = []

    def persistent(identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] in ("module", b"module"):
            return identity[1]
        kind, key, (_, _, *view) = _storage_id(file, identity)
        dtype = storage_dtype(file, kind)
        root = storages.setdefault(key, Storage(key, dtype))
        if not view or view[0] is None:
            return root
        _, start, length = _checked_view(file, view[0])
        views.append((root, Storage(key, dtype), start, length))
        return views[-1][1]

    magic = _pickle.load(file, 0, stop)
    version = _pickle.load(file, magic.end, stop)
    system = _pickle.load(file, version.end, stop)
    if magic.value != _MAGIC or not isinstance(version.value, int) or version.value != 1001:
        raise FormatError(f"{file.name}: is of a version of PyTorch's legacy format that is not known")
    if isinstance(system.value, dict) and system.value.get("little_endian") is False:
        raise FormatError(f"{file.name}: {_BIG_ENDIAN}")
    loaded = _pickle.load(file, system.end, stop, CALLS, persistent)
    keys = _pickle.load(file, loaded.end, stop)
    _place_storages(file, storages, keys.value, keys.end)
    for root, view, start, length in views:
        if root.offset < 0 or (start + length) * root.dtype.itemsize > root.nbytes:
            raise FormatError(f"{file.name}: a view reaches beyond the storage {root.key!r}")
        view.offset = root.offset + start * root.dtype.itemsize
        view.nbytes = length * root.dtype.itemsize
    return _Opened(loaded.value, budget_of(loaded.end - system.end))


def _checked_view(file: Bytes, view: Any) -> tuple[Any, int, int]:
    if not isinstance(view, tuple) or len(view) != 3 or lengths(view[1:]) is None:
        raise FormatError(f"{file.name}: a view of a storage is none")
    return view


def _place_storages(file: Bytes, storages: dict[str, Storage], keys: Any, position: int) -> None:
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


# Writing

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if not name.endswith("UntypedStorage")}


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
