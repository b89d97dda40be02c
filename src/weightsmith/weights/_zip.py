"""Zip archives as a table of byte ranges: where each member lies, and where it will lie.

PyTorch's and numpy's files are zips whose members are stored as they are, so a tensor can be read
and written in place once its offset is known. Python's own zipfile neither tells where a member's
bytes begin nor lets them be written in any order, hence this module: a reader that believes nothing
and a planner that needs sizes only.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.errors import Error, FormatError
from weightsmith.weights._files import Bytes, read_bytes
from weightsmith.weights._layout import OutFile

STORED, DEFLATED = 0, 8

MOST_MEMBERS = 1_000_000
LARGEST_DIRECTORY = 2**26
"""Bytes of the table of contents. A hundred thousand tensors need about a tenth of it."""

_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_UTF8, _ENCRYPTED = 0x800, 0x1 | 0x40 | 0x2000
_DATE = 0x21  # 1 January 1980, the first day that the format knows: outputs do not depend on the clock
_UNIX, _MODE = 0x300, 0o100644 << 16  # whose names are UTF-8, and the permissions of what is unpacked
_PADDING = 0x4246  # the extra field in which PyTorch, too, puts what aligns the data


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive, as the table of contents tells it.

    Attributes:
        packed: bytes it takes in the archive; ``size``: bytes it has.
        header: where its own header begins; ``limit``: where what comes after it begins.
    """

    name: str
    method: int
    flags: int
    crc: int
    packed: int
    size: int
    header: int
    limit: int


class Archive:
    """A zip's table of contents, checked: no member outside the file, twice, or on top of another."""

    def __init__(self, file: Bytes):
        self.file = file
        directory, count, end, self.comment = _ending(file)
        found = list(_entries(file, directory, count, end))
        starts = sorted(member.header for member in found)
        self.members: dict[str, Member] = {}
        for member in found:
            place = bisect.bisect_right(starts, member.header)
            limit = starts[place] if place < len(starts) else directory
            shared = place > 1 and starts[place - 2] == member.header
            if shared or member.header + _LOCAL.size + member.packed > limit:
                raise FormatError(f"{file.name}: member {member.name!r} overlaps what comes after it")
            if member.name in self.members:
                raise FormatError(f"{file.name}: member {member.name!r} stands twice")
            self.members[member.name] = dataclasses.replace(member, limit=limit)

    def offset(self, member: Member) -> int:
        """Where the bytes of a member begin. Reads its own header, which must agree with the table."""
        where = f"{self.file.name}: member {member.name!r}"
        if member.flags & _ENCRYPTED:
            raise FormatError(f"{where} is encrypted")
        raw = read_bytes(self.file, member.header, _LOCAL.size)
        signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(raw)
        if signature != b"PK\3\4":
            raise FormatError(f"{where} has no header at byte {member.header}")
        name = read_bytes(self.file, member.header + _LOCAL.size, min(name_length, self.file.size - member.header - 30))
        if _decoded(name, member.flags) != member.name or method != member.method or flags & _ENCRYPTED:
            raise FormatError(f"{where} has a header that says something else than the table of contents")
        start = member.header + _LOCAL.size + name_length + extra_length
        if start + member.packed > member.limit:
            raise FormatError(f"{where} overlaps what comes after it")
        return start

    def stored(self, name: str) -> tuple[int, int]:
        """Offset and size of a member that is not compressed."""
        member = self.members.get(name)
        if member is None:
            raise FormatError(f"{self.file.name}: truncated or damaged: there is no member {name!r}")
        start = self.offset(member)
        if member.method != STORED or member.packed != member.size:
            raise FormatError(
                f"{self.file.name}: member {name!r} is compressed, so its values have no place of their own; "
                "unpack the archive and pack it again without compression (zip -0)"
            )
        return start, member.size


def _ending(file: Bytes) -> tuple[int, int, int, bytes]:
    """Where the table of contents begins, how many entries it has, where it ends; the comment."""
    length = min(file.size, _END.size + _FULL16)
    tail = read_bytes(file, file.size - length, length)
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and (len(tail) - at < _END.size or at + _END.size + _END.unpack_from(tail, at)[-1] != len(tail)):
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise FormatError(f"{file.name}: truncated: the zip archive has no end record")
    _, disk, first_disk, _, count, size, directory, _ = _END.unpack_from(tail, at)
    end, comment = file.size - length + at, tail[at + _END.size :]
    if (wide := _ending64(file, end)) is not None:  # PyTorch writes one, however small the file
        disk, first_disk, count, size, directory, end = wide
    if disk or first_disk:
        raise FormatError(f"{file.name}: is one part of an archive that spans several files")
    if directory + size != end:
        raise FormatError(f"{file.name}: truncated or damaged: the zip's table of contents is not where it should be")
    if size > LARGEST_DIRECTORY or count > min(MOST_MEMBERS, size // _ENTRY.size):
        raise FormatError(f"{file.name}: claims {count} members in a table of contents of {size} bytes")
    return directory, count, end, comment


def _ending64(file: Bytes, end: int) -> tuple[int, int, int, int, int, int] | None:
    if end < _LOCATOR.size:
        return None
    signature, _, at, _ = _LOCATOR.unpack(read_bytes(file, end - _LOCATOR.size, _LOCATOR.size))
    if signature != b"PK\6\7":
        return None
    if at + _END64.size > end - _LOCATOR.size:
        raise FormatError(f"{file.name}: truncated or damaged: the zip's end record is not where it should be")
    signature, _, _, _, disk, first_disk, _, count, size, directory = _END64.unpack(read_bytes(file, at, _END64.size))
    if signature != b"PK\6\6":
        raise FormatError(f"{file.name}: truncated or damaged: the zip's end record is not where it should be")
    return disk, first_disk, count, size, directory, at


def _entries(file: Bytes, directory: int, count: int, end: int) -> Iterator[Member]:
    raw = read_bytes(file, directory, end - directory)
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(raw) or raw[at : at + 4] != b"PK\1\2":
            raise FormatError(f"{file.name}: truncated or damaged: the zip's table of contents is no table")
        head = _ENTRY.unpack_from(raw, at)
        (flags, method, _, _, crc, packed, size), header = head[3:10], head[16]
        name_length, extra_length, comment_length = head[10:13]
        at += _ENTRY.size
        name = _decoded(raw[at : at + name_length], flags)
        extra = raw[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        size, packed, header = _wide(file, name, extra, [size, packed, header])
        yield Member(name, method, flags, crc, packed, size, header, directory)
    if at != len(raw):
        raise FormatError(f"{file.name}: truncated or damaged: the zip's table of contents has another length")


def _decoded(raw: bytes, flags: int) -> str:
    return raw.decode("utf-8", "backslashreplace") if flags & _UTF8 else raw.decode("cp437")


def _wide(file: Bytes, name: str, extra: bytes, values: list[int]) -> list[int]:
    """Size, packed size and offset, of which those that do not fit in 32 bits stand in an extra field."""
    if _FULL32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == 1 and len(body) >= 8 * values.count(_FULL32):
            numbers = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            return [next(numbers) if value == _FULL32 else value for value in values]
    raise FormatError(f"{file.name}: member {name[:200]!r} does not say how long it is")


# Writing


@dataclass(frozen=True, slots=True)
class _Planned:
    """A member to be: where its header, its bytes and its entry in the table of contents stand."""

    header: int
    start: int
    size: int
    entry: int
    copy_of: int


@dataclass(frozen=True, slots=True)
class Part:
    """The content of a member: bytes that are known now, then ``rest`` bytes that are written later.

    ``copy_of`` names an earlier member of the same size, whose bytes it gets when all is written.
    """

    known: bytes
    rest: int = 0
    copy_of: str | None = None


def plan(
    name: str, parts: Mapping[str, Part], comment: bytes = b"", alignment: int = 64
) -> tuple[OutFile, dict[str, int], Callable[[Path], None]]:
    """A zip of stored members, before their content is known.

    Args:
        name: of the file.
        parts: member name -> what is known of it.
        comment: of the archive, at most 65,535 bytes.
        alignment: of each member's first byte, a power of two.

    Returns:
        The file with all headers (checksums still 0), the offset of each member's ``rest``, and a
        function of the folder that puts the checksums in once the values stand in their places. It
        may be called again.

    Raises:
        Error: a member's name or the comment is longer than the format allows.
    """
    if len(comment) > _FULL16:
        raise Error(f"{name}: a zip's comment has at most {_FULL16} bytes, got {len(comment)}")
    fixed: list[tuple[int, bytes]] = []
    rests: dict[str, int] = {}
    placed: dict[str, tuple[int, int, int]] = {}
    entries: list[bytes] = []
    position = 0
    for member, part in parts.items():
        size = len(part.known) + part.rest
        crc = 0 if part.rest else zlib.crc32(part.known)
        local, entry = _headers(name, member, size, crc, position, alignment)
        fixed.append((position, local + part.known))
        entries.append(entry)
        start = position + len(local)
        rests[member] = start + len(part.known)
        placed[member] = (position, start, size)
        position = start + size
    directory = b"".join(entries)
    fixed.append((position, directory + _end(len(entries), len(directory), position, comment)))
    late = _late(parts, placed, entries, position)
    out = OutFile(name, position + len(fixed[-1][1]), fixed)
    return out, rests, functools.partial(_finish, name, late)


def _headers(file: str, member: str, size: int, crc: int, at: int, alignment: int) -> tuple[bytes, bytes]:
    raw = member.encode("utf-8")
    if len(raw) > _FULL16:
        raise Error(f"{file}: the name {member[:60]!r}... has {len(raw)} bytes; a zip allows {_FULL16}")
    large, far = size >= _FULL32, at >= _FULL32
    version = 45 if large or far else 20
    short = _FULL32 if large else size
    wide = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
    # The padding is an extra field of its own, whose head of four bytes must fit as well.
    pad = -(at + _LOCAL.size + len(raw) + len(wide) + 4) % alignment
    extra = wide + struct.pack("<2H", _PADDING, pad) + bytes(pad)
    common = (_UTF8, STORED, 0, _DATE, crc, short, short, len(raw))
    local = _LOCAL.pack(b"PK\3\4", version, *common, len(extra)) + raw + extra
    numbers = [size, size] * large + [at] * far
    wide = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    entry = _ENTRY.pack(b"PK\1\2", _UNIX | version, version, *common, len(wide), 0, 0, 0, _MODE, _FULL32 if far else at)
    return local, entry + raw + wide


def _end(count: int, size: int, at: int, comment: bytes) -> bytes:
    """The end record; its ``_FULL`` values send the reader to the wide one before it."""
    wide = b""
    if count >= _FULL16 or size >= _FULL32 or at >= _FULL32:
        wide = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, at)
        wide += _LOCATOR.pack(b"PK\6\7", 0, at + size, 1)
    count, size, at = min(count, _FULL16), min(size, _FULL32), min(at, _FULL32)
    return wide + _END.pack(b"PK\5\6", 0, 0, count, count, size, at, len(comment)) + comment


def _late(
    parts: Mapping[str, Part], placed: Mapping[str, tuple[int, int, int]], entries: list[bytes], directory: int
) -> list[_Planned]:
    late: list[_Planned] = []
    at = directory
    for (member, part), entry in zip(parts.items(), entries, strict=True):
        header, start, size = placed[member]
        if part.copy_of is not None and placed[part.copy_of][2] != size:
            raise Error(f"the member {member!r} cannot be a copy of {part.copy_of!r}, which has another size")
        if part.rest:
            late.append(_Planned(header, start, size, at, -1 if part.copy_of is None else placed[part.copy_of][1]))
        at += len(entry)
    return late


def _finish(name: str, late: list[_Planned], folder: Path) -> None:
    """Copy what is a copy, and put every checksum into both places where the format has it."""
    descriptor = os.open(Path(folder) / name, os.O_RDWR)
    try:
        buffer = bytearray(2**20)
        for member in late:
            crc = _checksum(name, descriptor, member, memoryview(buffer)).to_bytes(4, "little")
            os.pwrite(descriptor, crc, member.header + 14)
            os.pwrite(descriptor, crc, member.entry + 16)
    finally:
        os.close(descriptor)


def _checksum(name: str, descriptor: int, member: _Planned, buffer: memoryview) -> int:
    source = member.start if member.copy_of < 0 else member.copy_of
    crc, done = 0, 0
    while done < member.size:
        got = os.preadv(descriptor, [buffer[: member.size - done]], source + done)
        if got == 0:
            raise FormatError(f"{name}: ends at byte {source + done}, before all values are written")
        if member.copy_of >= 0 and os.pwrite(descriptor, buffer[:got], member.start + done) != got:
            raise OSError(f"{name}: no space left")
        crc = zlib.crc32(buffer[:got], crc)
        done += got
    return crc
