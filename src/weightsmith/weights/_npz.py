"""numpy's ``.npz``: a zip with one array in each member.

``np.savez`` stores the arrays as they are, so each is a range of the file. ``np.savez_compressed``
packs them; such an array is unpacked whole when it is read. Arrays of Python objects are pickles
and are refused.

numpy knows no ties: every name has an array of its own here, so that ``np.load`` finds them all.
What is tied is written in the comment of the archive, beside the metadata, where numpy does not
look and `read` does.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.lib import format as npy
from torch import Tensor

from weightsmith.errors import Error, FormatError, did_you_mean
from weightsmith.weights._files import Bytes, read_bytes
from weightsmith.weights._layout import Contents, Layout
from weightsmith.weights._lazy import Lazy, Scratch, as_buffer
from weightsmith.weights._spec import Spec, dtype_name
from weightsmith.weights._strided import strided
from weightsmith.weights._torchtree import LARGEST_TENSOR
from weightsmith.weights._zip import DEFLATED, STORED, Archive, Member, Part, plan

LARGEST_HEADER = 2**16
LARGEST_COMMENT = 2**16 - 1
LARGEST_RATIO = 1032
"""Bytes that one packed byte can become; the packing can do no more, so who claims it lies."""

_DTYPES: dict[str, torch.dtype] = {
    "|b1": torch.bool,
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "<u2": torch.uint16,
    "<i2": torch.int16,
    "<u4": torch.uint32,
    "<i4": torch.int32,
    "<u8": torch.uint64,
    "<i8": torch.int64,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<c8": torch.complex64,
    "<c16": torch.complex128,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RUN = 2**20


def read(file: Bytes) -> Contents:
    """The arrays of one ``.npz`` file as tensors, without reading any.

    Raises:
        FormatError: the file is damaged or lying, or holds arrays that are no plain numbers.
    """
    archive = Archive(file)
    nodes: dict[str, Lazy] = {}
    found = {name.removesuffix(".npy"): member for name, member in archive.members.items() if name.endswith(".npy")}
    if not found:
        raise FormatError(f"{file.name}: is a zip archive, but no .npz file: it has no arrays")
    for name, member in found.items():
        nodes[name] = _node(archive, name, member)
    metadata, ties = _comment(archive)
    for alias, name in ties.items():
        if alias in found and name in found and _same(found[alias], found[name]):
            nodes[alias] = nodes[name]
    return Contents(nodes, metadata)


def _same(one: Member, other: Member) -> bool:
    """Whether two members have the same bytes, as far as the table of contents tells."""
    return (one.size, one.crc) == (other.size, other.crc)


def _comment(archive: Archive) -> tuple[dict[str, str], dict[str, str]]:
    """Metadata and ties; other people's comments say nothing."""
    try:
        found = json.loads(archive.comment)["weightsmith"]
        metadata, ties = found["metadata"], found["ties"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}, {}
    for words in (metadata, ties):
        if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
            return {}, {}
    return metadata, ties


def _node(archive: Archive, name: str, member: Member) -> Lazy:
    file, where = archive.file, f"{archive.file.name}: tensor {name[:200]!r}"
    start = archive.offset(member)
    if member.method not in (STORED, DEFLATED):
        raise FormatError(f"{where} is packed in a way that is not known (method {member.method})")
    if member.method == STORED and member.packed != member.size:
        raise FormatError(f"{where} says that it has {member.size} bytes and takes {member.packed}")
    if member.size > LARGEST_RATIO * (member.packed + 16):
        raise FormatError(f"{where} claims that {member.packed} bytes unpack to {member.size}")
    head = read_bytes(file, start, min(member.packed, LARGEST_HEADER))
    if member.method == DEFLATED:
        head = _unpacked(where, head, LARGEST_HEADER)
    spec, fortran, length = _header(where, head)
    if member.size != length + spec.nbytes:
        raise FormatError(f"{where}: {spec} is {spec.nbytes} bytes, its member has {member.size - length}")
    stride = _strides(spec.shape, fortran)
    if member.method == STORED:
        return strided(file, start + length, spec, stride)
    return Packed(file, where, start, member, length, spec, stride)


def _strides(shape: Sequence[int], fortran: bool) -> tuple[int, ...]:
    axes = range(len(shape))
    return tuple(math.prod(shape[:axis] if fortran else shape[axis + 1 :]) for axis in axes)


def _unpacked(where: str, packed: bytes, most: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, most)
    except zlib.error as error:
        raise FormatError(f"{where} cannot be unpacked: {error}") from None


def _header(where: str, head: bytes) -> tuple[Spec, bool, int]:
    """What an array says of itself, and where its values begin."""
    stream = io.BytesIO(head)
    try:
        version = npy.read_magic(stream)
        parse: Any = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = parse(stream, max_header_size=LARGEST_HEADER)
    # A header is a Python literal, and there is no list of what parsing a broken one can raise.
    except Exception as error:
        raise FormatError(f"{where} has no readable header: {type(error).__name__}: {str(error)[:200]}") from None
    if dtype.hasobject:
        raise FormatError(f"{where} is an array of Python objects, which only running a pickle could read")
    known = _DTYPES.get(dtype.str)
    if known is None:
        remedy = "; write it with .astype(dtype.newbyteorder('<'))" if dtype.str.startswith(">") else ""
        raise FormatError(f"{where} has numpy's dtype {str(dtype)[:80]}, which PyTorch does not have{remedy}")
    if len(shape) > 64 or any(isinstance(n, bool) or n < 0 for n in shape):
        raise FormatError(f"{where} has no valid shape")
    if math.prod(max(n, 1) for n in shape) > LARGEST_TENSOR:
        raise FormatError(f"{where} claims a shape that no tensor has")
    return Spec(tuple(shape), known), bool(fortran), stream.tell()


class Packed:
    """An array that was compressed: it has no parts, so it is unpacked whole."""

    def __init__(
        self, file: Bytes, where: str, offset: int, member: Member, head: int, spec: Spec, stride: tuple[int, ...]
    ):
        self.file, self.where, self.offset, self.member, self.head = file, where, offset, member, head
        self.spec, self.stride = spec, stride
        self.grain = max(spec.numel, 1)

    def read(self, start: int, stop: int, scratch: Scratch) -> Tensor:
        values = torch.empty(self.spec.numel, dtype=self.spec.dtype)
        self._unpack(as_buffer(values))
        return values.as_strided(self.spec.shape, self.stride).reshape(-1)[start:stop]

    def _unpack(self, target: memoryview) -> None:
        """Fill ``target``, which is as long as the member says, and never hold more than that."""
        unpacker, crc, done = zlib.decompressobj(-zlib.MAX_WBITS), 0, -self.head
        try:
            for packed in self._runs():
                # One byte more than there should be is asked for, so that a longer member shows.
                while run := unpacker.decompress(packed, min(_RUN, len(target) - done + 1)):
                    if done + len(run) > len(target):
                        raise FormatError(f"{self.where} unpacks to more than it says")
                    skipped = min(max(-done, 0), len(run))
                    target[done + skipped : done + len(run)] = run[skipped:]
                    crc, done = zlib.crc32(run, crc), done + len(run)
                    packed = unpacker.unconsumed_tail
        except zlib.error as error:
            raise FormatError(f"{self.where} cannot be unpacked: {error}") from None
        if done != len(target) or crc != self.member.crc:
            raise FormatError(f"{self.where} is damaged: its checksum or its length is wrong")

    def _runs(self) -> Iterable[bytes]:
        for start in range(0, self.member.packed, _RUN):
            yield read_bytes(self.file, self.offset + start, min(_RUN, self.member.packed - start))

    def inputs(self) -> Iterable[Lazy]:
        return ()

    def identity(self) -> object:
        return [self.file.identity(), self.offset, str(self.spec), list(self.stride)]


def layout(
    specs: Mapping[str, Spec],
    ties: Mapping[str, str],
    metadata: Mapping[str, str],
    name: str,
    names: Sequence[str] | None = None,
) -> Layout:
    """One file that ``np.load`` reads, each tensor under its name.

    Args:
        specs: canonical name -> spec.
        ties: alias -> canonical name. An alias is an array of its own, copied when all is written.
        metadata: words for the comment of the archive, which has 65,535 bytes for them and the
            ties: the longest of them are left out where they do not fit.
        name: of the file.
        names: all names, in the order of the members; canonical names first where left out.

    Raises:
        Error: a dtype that numpy does not have, or a name that is unknown, missing or stands twice.
    """
    for tensor, spec in specs.items():
        if spec.dtype not in _CODES:
            known = "float32" if spec.dtype.is_floating_point else "another dtype"
            raise Error(f"tensor {tensor}: numpy has no dtype for {dtype_name(spec.dtype)}; cast it to {known} first")
    order = list(names) if names is not None else [*specs, *ties]
    if sorted(order) != sorted([*specs, *ties]):
        raise Error(f"{name}: the order must name each of {len(specs)} tensors and {len(ties)} aliases once")
    unknown = [target for target in ties.values() if target not in specs]
    if unknown:
        raise Error(f"{name}: tied to the unknown tensor {unknown[0]}{did_you_mean(unknown[0], specs)}")
    parts: dict[str, Part] = {}
    for tensor in order:
        spec = specs[ties.get(tensor, tensor)]
        copied = f"{ties[tensor]}.npy" if tensor in ties else None
        parts[f"{tensor}.npy"] = Part(_npy_header(spec), spec.nbytes, copied)
    file, offsets, finish = plan(name, parts, _written_comment(name, ties, metadata))
    return Layout([file], {tensor: (0, offsets[f"{tensor}.npy"]) for tensor in specs}, finish=finish)


def _npy_header(spec: Spec) -> bytes:
    stream = io.BytesIO()
    described: dict[str, Any] = {"descr": _CODES[spec.dtype], "fortran_order": False, "shape": spec.shape}
    npy.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _written_comment(name: str, ties: Mapping[str, str], metadata: Mapping[str, str]) -> bytes:
    def comment(words: Mapping[str, str]) -> bytes:
        return json.dumps({"weightsmith": {"metadata": words, "ties": dict(ties)}}).encode()

    if not ties and not metadata:
        return b""
    if len(comment({})) > LARGEST_COMMENT:
        raise Error(f"{name}: an .npz file has no room for {len(ties)} ties; save it as safetensors or .pt")
    kept: dict[str, str] = {}
    for key in sorted(metadata, key=lambda key: len(metadata[key])):
        if len(comment({**kept, key: metadata[key]})) > LARGEST_COMMENT:
            break
        kept[key] = metadata[key]
    return comment({key: metadata[key] for key in metadata if key in kept})
