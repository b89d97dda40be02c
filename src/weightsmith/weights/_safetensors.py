"""The safetensors format: a JSON header that says where each tensor's bytes lie, then the bytes.

The header is read by our own code, because it must be checked before anything is believed and
because the tensors are read in ranges. Everything the format promises is checked: bounds, sizes,
order without holes or overlaps, unique names, known dtypes.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightsmith.errors import Error, FormatError
from weightsmith.weights._files import Bytes, check_json, read_bytes
from weightsmith.weights._layout import Contents, Layout, OutFile
from weightsmith.weights._lazy import Lazy, Stored
from weightsmith.weights._spec import DTYPES, FORMAT_BITS, NAMES, Spec, dtype_name

LARGEST_HEADER = 100_000_000
"""Bytes; the limit that the format's own library sets."""

PAGE = 4096
"""Values start on a page, so that file systems that can share blocks may."""


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlong, _REPR.maxlist = 200, 200, 60, 16


def read(file: Bytes) -> Contents:
    """The tensors of one file, without reading any. Names listed as tied in the metadata share a node."""
    header, start = _header(file)
    metadata = _metadata(file, header.pop("__metadata__", {}))
    nodes: dict[str, Lazy] = {}
    runs: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        spec, first, last = _entry(file, name, entry)
        runs.append((first, last, name))
        nodes[name] = Stored(file, start + first, spec)
    _check_runs(file, runs, file.size - start)
    # The convention of safetensors' own save_model: metadata maps a dropped name to the one it shares.
    for alias, name in list(metadata.items()):
        if name in header and alias not in header and alias != "format":
            nodes[alias] = nodes[name]
            del metadata[alias]
    return Contents(nodes, metadata)


def _header(file: Bytes) -> tuple[dict[str, Any], int]:
    if file.size < 8:
        raise FormatError(f"{file.name}: {file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(read_bytes(file, 0, 8), "little")
    if length > LARGEST_HEADER:
        raise FormatError(f"{file.name}: claims a header of {length} bytes; the format allows {LARGEST_HEADER}")
    if 8 + length > file.size:
        raise FormatError(f"{file.name}: truncated inside its header ({file.size} bytes of at least {8 + length})")
    raw = read_bytes(file, 8, length)
    check_json(raw, file.name)
    if not raw.startswith(b"{"):
        raise FormatError(f"{file.name}: not a safetensors file (its header does not start with '{{')")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if _SURROGATE.search(raw):  # half a character can be told in JSON, and written by nobody
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.name}: its header is no valid JSON: {str(error)[:200]}") from None
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the name {_short(twice)} stands twice")
    return found


def _short(value: object) -> str:
    """For a message: what a hostile file says may be long and deep."""
    return _REPR.repr(value)


def _count(bits: int) -> str:
    return f"{bits / 8:g}" if bits < 2**200 else "far too many"


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _metadata(file: Bytes, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{file.name}: __metadata__ must map words to words")
    return dict(found)


def _entry(file: Bytes, name: str, entry: Any) -> tuple[Spec, int, int]:
    where = f"{file.name}: tensor {_short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in FORMAT_BITS if isinstance(kind, str) else True:
        raise FormatError(f"{where} has the unknown dtype {_short(kind)}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(_is_count(n) for n in shape):
        raise FormatError(f"{where} has no valid shape: {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise FormatError(f"{where} has no valid data_offsets: {_short(offsets)}")
    first, last = offsets
    bits = math.prod(shape) * FORMAT_BITS[kind]
    if bits % 8 or last - first != bits // 8:
        raise FormatError(
            f"{where}: {kind}{_short(shape)} is {_count(bits)} bytes, its data_offsets span {last - first}"
        )
    if kind not in DTYPES:
        raise FormatError(f"{where} is {kind}, which this version of PyTorch has no dtype for")
    if kind == "F4":
        if not shape or shape[-1] % 2:
            raise FormatError(f"{where}: F4 packs two values in a byte, so its last axis must be even, not {shape}")
        shape = [*shape[:-1], shape[-1] // 2]
    return Spec(tuple(shape), DTYPES[kind]), first, last


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_runs(file: Bytes, runs: list[tuple[int, int, str]], available: int) -> None:
    end, before = 0, None
    for first, last, name in sorted(runs):
        if first != end:
            what = "overlaps" if first < end else "leaves a hole after"
            raise FormatError(
                f"{file.name}: tensor {_short(name)} {what} {_short(before)} (byte {first}, expected {end})"
            )
        end, before = last, name
        if end > available:
            raise FormatError(
                f"{file.name}: truncated: tensor {_short(name)} needs {end} bytes of values, the file has {available}"
            )
    if end != available:
        raise FormatError(f"{file.name}: {available - end} bytes after the last tensor belong to nobody")


def layout(
    specs: Mapping[str, Spec],
    ties: Mapping[str, str],
    metadata: Mapping[str, str],
    name: str,
    max_shard_size: int | None = None,
    index_metadata: Mapping[str, Any] | None = None,
) -> Layout:
    """One file called ``name``, or Hugging Face shards with an index when the bytes exceed the size.

    Args:
        specs: canonical name -> spec, in the order of the header.
        ties: alias -> canonical name; recorded in the metadata of the file that has the tensor.
        metadata: words for the header.
        name: ``model.safetensors``; shards become ``model-00001-of-00002.safetensors``.
        max_shard_size: bytes; a tensor larger than that gets a shard of its own.
        index_metadata: put beside ``total_size`` in the index of a sharded folder.
    """
    for tensor, spec in specs.items():
        if spec.dtype not in NAMES:
            raise Error(f"tensor {tensor}: safetensors has no dtype for {dtype_name(spec.dtype)}; cast it first")
    groups = _shards(specs, max_shard_size)
    stem, suffix = name.removesuffix(".safetensors"), ".safetensors"
    files: list[OutFile] = []
    places: dict[str, tuple[int, int]] = {}
    for number, group in enumerate(groups):
        own = name if len(groups) == 1 else f"{stem}-{number + 1:05d}-of-{len(groups):05d}{suffix}"
        words = dict(metadata) | {a: t for a, t in ties.items() if t in group}
        file, offsets = _file(own, {tensor: specs[tensor] for tensor in group}, words)
        files.append(file)
        places |= {tensor: (number, offset) for tensor, offset in offsets.items()}
    small: dict[str, bytes] = {}
    if len(groups) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {
            "metadata": {"total_size": total, **(index_metadata or {})},
            "weight_map": {tensor: files[places[tensor][0]].name for tensor in specs},
        }
        small[f"{name}.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    return Layout(files, places, small)


def _shards(specs: Mapping[str, Spec], largest: int | None) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if largest is not None and groups[-1] and size + spec.nbytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    return groups


def _file(name: str, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[OutFile, dict[str, int]]:
    # Wide dtypes first, so that every tensor is aligned to its own item and can be viewed in place.
    ordered = sorted(specs, key=lambda tensor: -specs[tensor].dtype.itemsize)
    ends, position = {}, 0
    for tensor in ordered:
        ends[tensor] = (position, position + specs[tensor].nbytes)
        position += specs[tensor].nbytes
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for tensor, spec in specs.items():
        shape = list(spec.shape)
        if NAMES[spec.dtype] == "F4":
            shape[-1] *= 2
        header[tensor] = {"dtype": NAMES[spec.dtype], "shape": shape, "data_offsets": list(ends[tensor])}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(raw)) // PAGE) * PAGE - 8
    if length > LARGEST_HEADER:
        raise Error(f"{name}: {len(specs)} tensors make a header of {length} bytes; use more shards (max_shard_size=)")
    fixed = length.to_bytes(8, "little") + raw.ljust(length)
    offsets = {tensor: 8 + length + first for tensor, (first, _) in ends.items()}
    return OutFile(name, 8 + length + position, [(0, fixed)]), offsets


def check_names(names: Iterable[str], where: str) -> None:
    """Names that the format reserves are refused before anything is written."""
    bad: Sequence[str] = [name for name in names if name == "__metadata__"]
    if bad:
        raise Error(f"{where}: the name {bad[0]!r} is reserved by the safetensors format")
