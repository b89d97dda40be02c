"""Zip archives: what we plan Python and unzip can read, and what lies is refused."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from weightsmith.errors import Error, FormatError
from weightsmith.weights._files import LocalFile, read_bytes
from weightsmith.weights._layout import OutFile
from weightsmith.weights._zip import Archive, Part, plan

PARTS = {
    "a/known": Part(b"hello"),
    "a/late": Part(b"head:", 9),
    "a/ünï": Part(b"", 3),
    "a/empty": Part(b""),
    "a/twin": Part(b"head:", 9, copy_of="a/late"),
}
CONTENT = {
    "a/known": b"hello",
    "a/late": b"head:ninebytes",
    "a/ünï": b"xyz",
    "a/empty": b"",
    "a/twin": b"head:ninebytes",
}


def prepared(folder: Path, out: OutFile) -> Path:
    path = folder / out.name
    with open(path, "wb") as file:
        file.truncate(out.size)
        for offset, raw in out.fixed:
            file.seek(offset)
            file.write(raw)
    return path


def written(folder: Path) -> tuple[Path, dict[str, int]]:
    out, rests, finish = plan("out.zip", PARTS, b"a comment")
    path = prepared(folder, out)
    with open(path, "r+b") as file:
        for name in ("a/ünï", "a/late"):  # any order
            file.seek(rests[name])
            file.write(CONTENT[name][len(PARTS[name].known) :])
    finish(folder)
    finish(folder)  # repeatable
    return path, rests


def patched(path: Path, at: int, raw: bytes) -> LocalFile:
    content = bytearray(path.read_bytes())
    content[at : at + len(raw)] = raw
    other = path.with_name("patched.zip")
    other.write_bytes(content)
    return LocalFile(other)


def test_python_reads_what_was_planned(tmp_path: Path) -> None:
    path, rests = written(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == CONTENT
        assert archive.comment == b"a comment"
    assert all((offset - len(PARTS[name].known)) % 64 == 0 for name, offset in rests.items())


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_is_content(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    environment = os.environ | {"LC_ALL": "C.UTF-8"}  # where it cannot show a name it calls it an error
    done = subprocess.run(["unzip", "-tq", str(path)], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b""), done.stdout


def test_our_reader_agrees(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    archive = Archive(LocalFile(path))
    assert archive.comment == b"a comment"
    assert {name: read_bytes(archive.file, *archive.stored(name)) for name in archive.members} == CONTENT


def test_reads_what_python_writes(tmp_path: Path) -> None:
    path = tmp_path / "python.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("plain", b"plain text")
        archive.writestr("packed", b"packed text" * 100, compress_type=zipfile.ZIP_DEFLATED)
        with archive.open("wide", "w", force_zip64=True) as member:
            member.write(b"wide")
    found = Archive(LocalFile(path))
    assert read_bytes(found.file, *found.stored("plain")) == b"plain text"
    assert read_bytes(found.file, *found.stored("wide")) == b"wide"
    with pytest.raises(FormatError, match=r"python.zip: member 'packed' is compressed"):
        found.stored("packed")
    with pytest.raises(FormatError, match="no member 'other'"):
        found.stored("other")


def test_checksums_wait_for_the_values(tmp_path: Path) -> None:
    out, rests, finish = plan("out.zip", {"late": Part(b"", 4)})
    path = prepared(tmp_path, out)
    with open(path, "r+b") as file:
        file.seek(rests["late"])
        file.write(b"late")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "late"
    finish(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_file_that_was_cut_does_not_get_checksums(tmp_path: Path) -> None:
    out, rests, finish = plan("out.zip", {"late": Part(b"", 4000)})
    path = prepared(tmp_path, out)
    os.truncate(path, rests["late"] + 100)
    with pytest.raises(FormatError, match="before all values are written"):
        finish(tmp_path)


def test_members_beyond_four_gigabytes(tmp_path: Path) -> None:
    parts = {"large": Part(b"", 2**32 + 5), "far": Part(b"far"), "after": Part(b"", 7)}
    out, rests, _ = plan("out.zip", parts)
    path = prepared(tmp_path, out)  # sparse: takes no space
    with zipfile.ZipFile(path) as archive:
        assert [info.file_size for info in archive.infolist()] == [2**32 + 5, 3, 7]
        assert archive.read("far") == b"far"
    found = Archive(LocalFile(path))
    assert found.stored("large") == (rests["large"], 2**32 + 5)
    assert found.stored("after") == (rests["after"], 7)
    assert rests["after"] > 2**32
    assert read_bytes(found.file, *found.stored("far")) == b"far"


def test_more_members_than_sixteen_bits_count(tmp_path: Path) -> None:
    out, _, _ = plan("out.zip", {str(n): Part(b"") for n in range(65_600)}, alignment=4)
    path = prepared(tmp_path, out)
    assert len(Archive(LocalFile(path)).members) == 65_600
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 65_600


def test_names_and_comments_have_a_limit() -> None:
    with pytest.raises(Error, match="a zip allows 65535"):
        plan("out.zip", {"x" * 70_000: Part(b"")})
    with pytest.raises(Error, match="comment has at most 65535"):
        plan("out.zip", {}, b"x" * 70_000)
    with pytest.raises(Error, match="another size"):
        plan("out.zip", {"a": Part(b"", 4), "b": Part(b"", 5, copy_of="a")})


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    raw = path.read_bytes()
    cut = tmp_path / "cut.zip"
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        with pytest.raises(FormatError, match=r"cut\.zip"):
            Archive(LocalFile(cut))


def entry_of(path: Path, name: bytes) -> int:
    """Where a member's entry in the table of contents begins."""
    return path.read_bytes().rindex(name) - 46


def test_members_on_top_of_each_other_are_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    first, second = entry_of(path, b"a/known"), entry_of(path, b"a/late")
    header = path.read_bytes()[first + 42 : first + 46]
    with pytest.raises(FormatError, match="overlaps"):
        Archive(patched(path, second + 42, header))
    with pytest.raises(FormatError, match=r"member 'a/known' overlaps"):
        Archive(patched(path, first + 20, struct.pack("<2I", 5000, 5000)))


def test_a_member_longer_than_its_place_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    entry = entry_of(path, b"a/known")
    # Fits after the shortest possible header, not after the one that is there.
    archive = Archive(patched(path, entry + 20, struct.pack("<2I", 30, 30)))
    with pytest.raises(FormatError, match=r"member 'a/known' overlaps"):
        archive.stored("a/known")


def test_a_member_outside_the_file_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    with pytest.raises(FormatError, match="overlaps"):
        Archive(patched(path, entry_of(path, b"a/late") + 42, struct.pack("<I", 2**31)))


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    out, _, _ = plan("out.zip", {"one": Part(b"1"), "two": Part(b"2")})
    path = prepared(tmp_path, out)
    with pytest.raises(FormatError, match=r"'one' stands twice"):
        Archive(patched(path, entry_of(path, b"two") + 46, b"one"))


def test_headers_that_disagree_are_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    with pytest.raises(FormatError, match="says something else"):
        Archive(patched(path, path.read_bytes().index(b"a/known"), b"a/other")).stored("a/known")
    with pytest.raises(FormatError, match="has no header at byte 0"):
        Archive(patched(path, 0, b"PK\1\1")).stored("a/known")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    with pytest.raises(FormatError, match=r"'a/known' is encrypted"):
        Archive(patched(path, entry_of(path, b"a/known") + 8, struct.pack("<H", 0x801))).stored("a/known")


def test_a_table_of_contents_that_lies_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    end = path.read_bytes().rindex(b"PK\5\6")
    with pytest.raises(FormatError, match="claims 60000 members"):
        Archive(patched(path, end + 8, struct.pack("<2H", 60_000, 60_000)))
    with pytest.raises(FormatError, match="another length"):
        Archive(patched(path, end + 8, struct.pack("<2H", 2, 2)))
    with pytest.raises(FormatError, match="not where it should be"):
        Archive(patched(path, end + 12, struct.pack("<I", 3)))
    with pytest.raises(FormatError, match="several files"):
        Archive(patched(path, end + 4, struct.pack("<H", 1)))
    with pytest.raises(FormatError, match="does not say how long it is"):
        Archive(patched(path, entry_of(path, b"a/known") + 24, b"\xff" * 4))
