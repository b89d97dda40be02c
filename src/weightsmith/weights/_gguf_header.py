"""What a GGUF file says before its values: words and numbers about the model, and where each tensor lies.

The header is walked by our own code, in a window of bounded size, because it comes from strangers
and because all that is wanted of a vocabulary of 250,000 words is how many there are. What the
format promises is checked: counts, bounds, alignment, unique names, no overlaps.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import FormatError, missing
from weightsmith.weights._files import Bytes, read_bytes

WINDOW = 2**20
LARGEST_HEADER = 2**29  # bytes walked
MOST_KEYS = 2**16
MOST_TENSORS = 2**17
MOST_WORDS = 2**23  # strings and arrays stepped over, one by one
LARGEST_KEPT = 2**24  # bytes of words and numbers that are remembered
LONGEST_TEXT = 2**16  # of one word that is remembered
LONGEST_LIST = 1024  # numbers of one array that are remembered
FEW = 8  # of a longer one
DEEPEST = 4  # arrays in arrays
LONGEST_NAME = 1024

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4


@dataclass(frozen=True)
class Summary:
    """An array too long to keep: how many items, and the first few."""

    count: int
    first: list[Any]


@dataclass(frozen=True)
class Kind:
    """How values are packed: ``nbytes`` for each ``block`` of values."""

    number: int
    name: str
    block: int
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. ``shape`` is in PyTorch's order, ``offset`` counts from the start of the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.nbytes


@dataclass(frozen=True)
class Header:
    """Everything before the values."""

    words: dict[str, Any]
    entries: dict[str, Entry]


def read_header(file: Bytes) -> Header:
    """The header of a file, checked.

    Raises:
        FormatError: it is cut short, contradicts itself, or asks for more than a header may.
        MissingPackage: the package gguf, which knows the sizes of the packed types, is not installed.
    """
    cursor = _Cursor(file)
    tensors, keys = _counts(cursor)
    words: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.name("a key")
        kind = cursor.number(_UINT32)
        if key in words:
            raise FormatError(f"{file.name}: the key {key!r} stands twice")
        cursor.where = f"the key {key!r}"
        if key == "general.alignment" and kind != _UINT32:
            raise FormatError(f"{file.name}: general.alignment is not an unsigned 32-bit number")
        words[key] = cursor.value(kind)
    found = [_info(cursor) for _ in range(tensors)]
    alignment = words.get("general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise FormatError(f"{file.name}: an alignment of {alignment} is no power of two")
    start = -(-cursor.position // alignment) * alignment
    return Header(words, _placed(file, found, start, alignment))


def _counts(cursor: _Cursor) -> tuple[int, int]:
    file = cursor.file
    if file.size < 24 or cursor.take(4) != b"GGUF":
        raise FormatError(f"{file.name}: not a GGUF file, or cut off in its first bytes")
    version = cursor.number(_UINT32)
    if version & 0xFFFF == 0:
        raise FormatError(f"{file.name}: a big-endian GGUF file; turn it with gguf-convert-endian first")
    if version not in (2, 3):
        raise FormatError(f"{file.name}: GGUF version {version}; only 2 and 3 can be read")
    tensors, keys = cursor.number(10), cursor.number(10)
    if tensors > MOST_TENSORS or keys > MOST_KEYS:
        raise FormatError(
            f"{file.name}: claims {tensors} tensors and {keys} keys; the most are {MOST_TENSORS} and {MOST_KEYS}"
        )
    return tensors, keys


@dataclass
class _Info:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _info(cursor: _Cursor) -> _Info:
    name = cursor.name("a tensor")
    cursor.where = f"the tensor {name!r}"
    axes = cursor.number(_UINT32)
    if axes > 4:
        raise FormatError(f"{cursor.file.name}: tensor {name!r} has {axes} axes; GGUF has at most 4")
    # The format writes the fastest axis first.
    shape = tuple(reversed([cursor.number(10) for _ in range(axes)]))
    return _Info(name, shape, cursor.number(_UINT32), cursor.number(10))


def _placed(file: Bytes, found: list[_Info], start: int, alignment: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for info in found:
        where = f"{file.name}: tensor {info.name!r}"
        kind = kind_of(info.kind)
        if kind is None:
            raise FormatError(f"{where} has the type {info.kind}, which the installed gguf package does not know")
        row = info.shape[-1] if info.shape else 1
        if row % kind.block:
            raise FormatError(f"{where}: rows of {row} values cannot be packed as {kind.name} ({kind.block} together)")
        if info.offset % alignment:
            raise FormatError(f"{where} begins at byte {info.offset}, which is not aligned to {alignment}")
        if info.name in entries:
            raise FormatError(f"{where} stands twice")
        entry = Entry(info.name, kind, info.shape, start + info.offset)
        if entry.offset + entry.nbytes > file.size:
            raise FormatError(
                f"{where}: truncated: {kind.name}{list(info.shape)} ends at byte {entry.offset + entry.nbytes}, "
                f"the file has {file.size}"
            )
        entries[info.name] = entry
    _check_overlaps(file, entries)
    return entries


def _check_overlaps(file: Bytes, entries: dict[str, Entry]) -> None:
    end, before = 0, ""
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.nbytes and entry.offset < end:
            raise FormatError(f"{file.name}: tensor {entry.name!r} overlaps {before!r}")
        end, before = max(end, entry.offset + entry.nbytes), entry.name


@functools.cache
def kind_of(number: int) -> Kind | None:
    """The packing with this number, or None if the gguf package does not know it."""
    try:
        import gguf
    except ImportError:
        raise missing("gguf", "gguf", "reading GGUF") from None
    try:
        packing = gguf.GGMLQuantizationType(number)
        block, nbytes = gguf.GGML_QUANT_SIZES[packing]
    except (ValueError, KeyError):
        return None
    return Kind(number, packing.name, block, nbytes)


class _Cursor:
    """Walks through the header, with one window of it in memory."""

    def __init__(self, file: Bytes):
        self.file = file
        self.position = 0
        self.where = "the beginning"
        self._limit = min(file.size, LARGEST_HEADER)
        self._window, self._from = b"", 0
        self._stepped = 0
        self._kept = 0

    def _need(self, nbytes: int) -> None:
        if self.position + nbytes > self._limit:
            what = "truncated" if self._limit == self.file.size else f"a header of over {LARGEST_HEADER} bytes,"
            raise FormatError(f"{self.file.name}: {what} in its header, at {self.where}")

    def take(self, nbytes: int) -> bytes:
        first = self._at_hand(nbytes)
        self.position += nbytes
        return self._window[first : first + nbytes]

    def _at_hand(self, nbytes: int) -> int:
        """Where in the window the next bytes begin; the window is moved if they are not all in it."""
        self._need(nbytes)
        first = self.position - self._from
        if 0 <= first <= len(self._window) - nbytes:
            return first
        length = min(max(nbytes, WINDOW), self.file.size - self.position)
        self._window, self._from = read_bytes(self.file, self.position, length), self.position
        return 0

    def skip(self, nbytes: int) -> None:
        self._need(nbytes)
        self.position += nbytes

    def number(self, kind: int) -> Any:
        form = _NUMBERS[kind]
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def name(self, what: str) -> str:
        length = self.number(10)
        if length > LONGEST_NAME:
            raise FormatError(f"{self.file.name}: the name of {what} after {self.where} has {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.file.name}: the name of {what} after {self.where} is no text") from None

    def value(self, kind: int, depth: int = 0, keep: bool = True) -> Any:
        """The value at the cursor, or a summary, or nothing where it need not be kept."""
        if kind in _NUMBERS:
            return self.number(kind)
        self._step()
        if kind == _STRING:
            return self._text(keep)
        if kind == _ARRAY and depth < DEEPEST:
            return self._array(depth, keep)
        reason = "arrays nested too deep" if kind == _ARRAY else f"a value of the unknown type {kind}"
        raise FormatError(f"{self.file.name}: {reason} at {self.where}")

    def _text(self, keep: bool) -> str:
        length = self.number(10)
        self._need(length)
        if not keep:
            self.skip(length)
            return ""
        kept = min(length, LONGEST_TEXT)
        self._keep(kept)
        text = self.take(kept).decode("utf-8", errors="replace")
        self.skip(length - kept)
        return text if kept == length else f"{text}… ({length} bytes)"

    def _array(self, depth: int, keep: bool) -> Any:
        kind, count = self.number(_UINT32), self.number(10)
        if kind in _NUMBERS:
            width = struct.calcsize("<" + _NUMBERS[kind])
            kept = 0 if not keep else count if count <= LONGEST_LIST else FEW
            self._keep(32 * kept)
            values = list(struct.unpack(f"<{kept}{_NUMBERS[kind]}", self.take(kept * width)))
            self.skip((count - kept) * width)
        else:
            self._need(count * 8)  # every string and array begins with at least its length
            kept = min(count, FEW) if keep else 0
            values = [self.value(kind, depth + 1) for _ in range(kept)]
            if kind == _STRING:
                self._skip_texts(count - kept)
            else:
                for _ in range(count - kept):
                    self.value(kind, depth + 1, keep=False)
        return values if kept == count else Summary(count, values)

    def _skip_texts(self, count: int) -> None:
        """Step over strings without making any: vocabularies have hundreds of thousands."""
        self._step(count)
        length = struct.Struct("<Q").unpack_from
        while count:
            place = self._at_hand(8)
            last = len(self._window) - 8
            while count and place <= last:
                place += 8 + length(self._window, place)[0]
                count -= 1
            self.position = self._from + place
            self._need(0)

    def _step(self, count: int = 1) -> None:
        self._stepped += count
        if self._stepped > MOST_WORDS:
            raise FormatError(f"{self.file.name}: more than {MOST_WORDS} words in its header, at {self.where}")

    def _keep(self, nbytes: int) -> None:
        self._kept += nbytes
        if self._kept > LARGEST_KEPT:
            raise FormatError(f"{self.file.name}: more than {LARGEST_KEPT} bytes of words in its header ({self.where})")
