"""GGUF files, read as the Hugging Face checkpoints they were made from.

Packed values are unpacked range by range, by the package gguf. Names and the order of values inside
tensors go back to what the model's own code expects, for the families in `FAMILIES`; other files
keep their GGUF names. The result is what was stored, in float32: packing lost precision for good.
"""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError
from weightsmith.weights._files import Bytes, LocalFile
from weightsmith.weights._gguf_header import Entry, Header, Kind, Summary, read_header
from weightsmith.weights._gguf_names import COMPUTED, FAMILIES, Family, change_of, renamed
from weightsmith.weights._layout import Contents
from weightsmith.weights._lazy import Cast, Lazy, Scratch, Stored, as_buffer
from weightsmith.weights._spec import Spec, as_dtype, working

MOST_NAMES = 2**18
"""Tensors after stacked experts are told apart."""

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read(file: Bytes, path: Path | None = None, dtype: torch.dtype | str | None = None) -> Contents:
    """The tensors of one file, without reading any.

    Args:
        file: one file. Of a model split over several, every file is read with the names of the first.
        path: where the file lies on this machine; needed to find the others of a split model.
        dtype: for all floating-point tensors. By default packed ones become float32, others stay as they are.

    Returns:
        Tensors under Hugging Face names; ``metadata`` holds the file's own keys as JSON, and what
        was done to the names under ``weightsmith.gguf``.

    Raises:
        FormatError: the file is cut short or contradicts itself.
        Error: a tensor is packed in a way that the installed gguf package cannot unpack.
        MissingPackage: the package gguf is not installed.
    """
    header = read_header(file)
    others = _other_headers(file, path, header.words)
    words = others[0].words if others else header.words
    architecture = words.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    wanted = None if dtype is None else as_dtype(dtype)
    nodes, report = _nodes(file, header, family, words, wanted)
    names_there = {name for each in (header, *others) for name in each.entries}
    if family is not None:
        _tie(nodes, family, names_there)
        report["names"] = f"Hugging Face, as of {architecture}"
    else:
        report["names"] = f"as in GGUF: no table of names for the architecture {str(architecture)[:60]!r}"
    metadata = {key: _as_json(value) for key, value in words.items()}
    return Contents(nodes, metadata | {"weightsmith.gguf": json.dumps(report)})


def _nodes(
    file: Bytes, header: Header, family: Family | None, words: dict[str, Any], dtype: torch.dtype | None
) -> tuple[dict[str, Lazy], dict[str, Any]]:
    nodes: dict[str, Lazy] = {}
    report: dict[str, Any] = {}
    for entry in header.entries.values():
        if family is not None and entry.name in COMPUTED:
            report.setdefault("left out", []).append(entry.name)
            continue
        for name, node in _named(file, entry, family, words, dtype, report):
            if name in nodes:
                raise FormatError(f"{file.name}: tensor {entry.name!r} and another are both {name!r}")
            nodes[name] = node
        if len(nodes) > MOST_NAMES:
            raise FormatError(f"{file.name}: more than {MOST_NAMES} tensors, with the experts told apart")
    return nodes, report


def _named(
    file: Bytes,
    entry: Entry,
    family: Family | None,
    words: dict[str, Any],
    dtype: torch.dtype | None,
    report: dict[str, Any],
) -> Iterator[tuple[str, Lazy]]:
    """The tensors of a checkpoint that one tensor of the file becomes."""
    name, stacked = (None, False) if family is None else renamed(family, entry.name)
    if family is None or name is None or (stacked and len(entry.shape) < 2):
        if family is not None:
            report.setdefault("names unknown", []).append(entry.name)
        yield entry.name, _leaf(file, entry, dtype)
        return
    change = change_of(family, entry.name)
    if not stacked:
        node = _leaf(file, entry, dtype)
        yield name, node if change is None else _changed(node, change, words, f"{file.name}: tensor {entry.name!r}")
        return
    count, shape = entry.shape[0], entry.shape[1:]
    if count > MOST_NAMES:
        raise FormatError(f"{file.name}: tensor {entry.name!r} holds {count} experts")
    for expert in range(count):
        part = Entry(entry.name, entry.kind, shape, entry.offset + expert * (entry.nbytes // count))
        yield name.format(expert), _leaf(file, part, dtype)


def _tie(nodes: dict[str, Lazy], family: Family, there: Iterable[str]) -> None:
    """The output layer that the file leaves out is the embedding itself."""
    embedding = f"{family.names['token_embd']}.weight"
    if family.head and embedding in nodes and "output.weight" not in there:
        nodes.setdefault(family.head, nodes[embedding])


def _other_headers(file: Bytes, path: Path | None, words: dict[str, Any]) -> list[Header]:
    """For one file of a split model, the headers of all its files: only the first says what the model is."""
    count = words.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return []
    found = _SPLIT.match(path.name) if path is not None else None
    if path is None or found is None or int(found["count"]) != count:
        raise FormatError(
            f"{file.name}: one of {count} files of a split model, which need each other's headers: "
            f"put them in one local folder under names like model-00001-of-{count:05d}.gguf, or join them with "
            "llama-gguf-split --merge"
        )
    parts = [path.with_name(f"{found['stem']}-{n + 1:05d}-of-{count:05d}.gguf") for n in range(count)]
    return [_split_header(str(part), part.stat().st_mtime_ns if part.exists() else 0) for part in parts]


@functools.lru_cache(maxsize=256)
def _split_header(path: str, modified: int) -> Header:
    return read_header(LocalFile(path))


def _as_json(value: Any) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, Summary):
            return {"count": value.count, "first": plain(value.first)}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value

    return json.dumps(plain(value), ensure_ascii=False)


# Tensors


def _leaf(file: Bytes, entry: Entry, dtype: torch.dtype | None) -> Lazy:
    """The values as they lie in the file, unpacked."""
    plain = _PLAIN.get(entry.kind.name)
    if plain is not None:
        node = Stored(file, entry.offset, Spec(entry.shape, plain))
        return node if dtype in (None, plain) or not plain.is_floating_point else Cast(node, dtype)
    if not _can_unpack(entry.kind):
        raise Error(
            f"{file.name}: tensor {entry.name!r} is packed as {entry.kind.name}, which the installed gguf package "
            "cannot unpack; a newer one may"
        )
    return Packed(file, entry.offset, Spec(entry.shape, dtype or torch.float32), entry.kind)


class Packed:
    """Values packed in blocks of a file. Only the blocks of the range asked for are read and unpacked."""

    def __init__(self, file: Bytes, offset: int, spec: Spec, kind: Kind):
        self.file, self.offset, self.spec, self.kind = file, offset, spec, kind
        self.grain = kind.block

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        block, nbytes = self.kind.block, self.kind.nbytes
        first, last = start // block, -(-stop // block)
        packed = scratch.take((last - first) * nbytes, torch.uint8)
        self.file.read_into(self.offset + first * nbytes, as_buffer(packed))
        return unpack(packed, self.kind)

    def inputs(self) -> Iterable[Lazy]:
        return ()

    def identity(self) -> object:
        return [self.file.identity(), self.offset, str(self.spec), self.kind.name]


def unpack(packed: Tensor, kind: Kind) -> Tensor:
    """The float32 values of whole blocks.

    Args:
        packed: uint8 ``[blocks * kind.nbytes]``.
    """
    import gguf
    import numpy as np

    if not packed.numel():
        return torch.empty(0)
    with np.errstate(all="ignore"):  # strangers' scales may be infinite; that is no reason for warnings
        # One row, because the package works on few rows at a time and blocks are many.
        values = gguf.quants.dequantize(packed.numpy().reshape(1, -1), gguf.GGMLQuantizationType(kind.number))
    return torch.from_numpy(np.ascontiguousarray(values)).view(-1)


@functools.cache
def _can_unpack(kind: Kind) -> bool:
    try:
        unpack(torch.zeros(kind.nbytes, dtype=torch.uint8), kind)
    except NotImplementedError:
        return False
    return True


class Through:
    """The values of another node, changed within runs of ``grain``.

    Args:
        function: ``(values [n]) -> [n]``, given whole runs.
        label: what the function does, with its settings.
    """

    def __init__(
        self, source: Lazy, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], grain: int, label: list[Any]
    ):
        self.source, self.function, self.label = source, function, label
        self.spec = Spec(shape, source.spec.dtype)
        self.grain = math.lcm(max(grain, 1), source.grain)

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        return self.function(self.source.read(start, stop, scratch))

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return [*self.label, str(self.spec), self.source.identity()]


def _changed(node: Lazy, change: str, words: dict[str, Any], where: str) -> Lazy:
    """The checkpoint's values of a tensor that its converter had changed."""
    shape = node.spec.shape
    if change == "minus_one":
        return Through(node, _less_one, shape, 1, [change])
    if change == "log_negative":
        return Through(node, _log_of_negative, shape, 1, [change])
    if change == "first_axis":
        return node if len(shape) != 1 else Through(node, _same, (1, *shape), 1, [change])
    if change == "middle_axis":
        return node if len(shape) != 2 else Through(node, _same, (shape[0], 1, shape[1]), 1, [change])
    if change == "transpose":
        return _transposed(node, where)
    heads = _heads(words, change == "heads_kv", where)
    parts = 3 if change == "interleave" else 2
    if not shape or shape[0] % (heads * parts):
        raise FormatError(f"{where}: {shape[0] if shape else 1} rows are not {heads} heads of whole {parts}ths")
    return Interleaved(node, heads) if change == "interleave" else _halved(node, heads)


def _same(values: Tensor) -> Tensor:
    return values


def _less_one(values: Tensor) -> Tensor:
    return working(values) - 1


def _log_of_negative(values: Tensor) -> Tensor:
    return torch.log(-working(values))


def _transposed(node: Lazy, where: str) -> Lazy:
    if len(node.spec.shape) != 2:
        raise FormatError(f"{where}: a matrix is expected, not {list(node.spec.shape)}")
    rows, columns = node.spec.shape
    flip = functools.partial(_flip, rows=rows, columns=columns)
    return Through(node, flip, (columns, rows), rows * columns, ["transpose"])


def _flip(values: Tensor, rows: int, columns: int) -> Tensor:
    return values.view(rows, columns).t().reshape(-1)


def _halved(node: Lazy, heads: int) -> Lazy:
    """Rows of each head from pairs (0, half, 1, half + 1, ...) to two halves (0, 1, ..., half, half + 1, ...)."""
    shape = node.spec.shape
    pairs, width = shape[0] // heads // 2, math.prod(shape[1:])
    order = functools.partial(_halves, pairs=pairs, width=width)
    return Through(node, order, shape, pairs * 2 * width, ["heads", heads])


def _halves(values: Tensor, pairs: int, width: int) -> Tensor:
    return values.view(-1, pairs, 2, width).transpose(1, 2).reshape(-1)


class Interleaved:
    """Rows of queries, keys and values that lie one kind after another, head by head: q0 k0 v0 q1 k1 v1 ...

    Cut by heads, so that of each kind only the rows of the wanted heads are read.
    """

    def __init__(self, source: Lazy, heads: int):
        self.source, self.heads, self.spec = source, heads, source.spec
        self._run = max(source.spec.numel // 3 // heads, 1)  # values of one kind in one head
        self.grain = math.lcm(3 * self._run, 3 * source.grain)

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        first, last, kind = start // 3, stop // 3, self.spec.numel // 3
        parts = [self.source.read(k * kind + first, k * kind + last, scratch).view(-1, self._run) for k in range(3)]
        return torch.stack(parts, dim=1).reshape(-1)

    def inputs(self) -> Iterable[Lazy]:
        return (self.source,)

    def identity(self) -> object:
        return ["interleave", self.heads, self.source.identity()]


def _heads(words: dict[str, Any], kv: bool, where: str) -> int:
    architecture = words.get("general.architecture")
    heads = words.get(f"{architecture}.attention.head_count")
    if kv:
        heads = words.get(f"{architecture}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        what = "head_count_kv" if kv else "head_count"
        raise FormatError(
            f"{where}: its rows belong to heads, but {architecture}.attention.{what} is {str(heads)[:40]}"
        )
    return heads


# What travels beside the tensors


def companions(path: Path) -> dict[str, bytes]:
    """The configuration and the tokenizer of a model, rebuilt from the words of its GGUF file.

    This is left to the package transformers and takes seconds. What it cannot rebuild is left out,
    and without it the result is empty.

    Args:
        path: a GGUF file on this machine.

    Returns:
        File name -> content: ``config.json``, ``tokenizer.json``, ``tokenizer_config.json``, ...
    """
    file = LocalFile(path)
    read_header(file)  # transformers believes what it reads, so look first
    try:
        import transformers
    except ImportError:
        return {}
    made: dict[str, bytes] = {}
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        made |= _rebuilt(kind, file.path)
    return made


def _rebuilt(kind: Any, path: Path) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="weightsmith-") as place:
        try:
            kind.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True).save_pretrained(place)
        except Exception:  # it knows fewer models than there are, and says so in many ways
            return {}
        return {p.relative_to(place).as_posix(): p.read_bytes() for p in sorted(Path(place).rglob("*")) if p.is_file()}
