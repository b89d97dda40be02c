"""Bytes at offsets, on this machine."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest

from weightsmith.errors import Error, FormatError
from weightsmith.weights._files import LocalFile, LocalFolder, check_json, checked_name, is_remote, read_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "file"
    place.write_bytes(bytes(range(256)) * 40)
    return place


def test_reading(path: Path) -> None:
    file = LocalFile(path)
    assert (file.size, file.name) == (10240, str(path))
    assert read_bytes(file, 255, 3) == b"\xff\0\1"
    assert file.view(10, 4).tolist() == [10, 11, 12, 13]
    assert file.view(10240, 0).numel() == read_bytes(file, 10240, 0).__len__() == 0
    for offset, count in ((10239, 2), (-1, 1), (0, -1), (2**62, 2**62)):
        with pytest.raises(FormatError, match="file: wanted bytes"):
            read_bytes(file, offset, count)
    with pytest.raises(FormatError, match="file: ends at byte 10240"):
        file.view(10239, 2)


def test_threads_share_one_descriptor(path: Path) -> None:
    file, seen = LocalFile(path), set()
    gate = threading.Barrier(8)

    def read() -> None:
        gate.wait()
        seen.add((file.descriptor(), read_bytes(file, 256, 2)))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1


def test_the_descriptor_is_closed_with_the_last_who_knew_it(path: Path) -> None:
    file = LocalFile(path)
    descriptor = file.descriptor()
    del file
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_writing_to_a_view_never_reaches_the_file(path: Path) -> None:
    before = path.read_bytes()
    LocalFile(path).view(0, 100).fill_(7)
    assert path.read_bytes() == before


def test_a_file_that_changes_under_us(path: Path) -> None:
    file = LocalFile(path)
    early = file.view(0, 10)
    os.truncate(path, 100)
    with pytest.raises(FormatError, match="ends at byte 100"):
        file.view(90, 20)
    with pytest.raises(FormatError, match="ends at byte 100, 10 bytes early"):
        file.read_into(90, memoryview(bytearray(20)))
    assert early[5] == 5
    late = LocalFile(path)
    path.unlink()
    path.write_bytes(b"other")
    with pytest.raises(Error, match="another file has taken its name"):
        read_bytes(late, 0, 1)
    gone = LocalFile(path)
    path.unlink()
    with pytest.raises(Error, match="file: No such file"):
        read_bytes(gone, 0, 1)


def test_identity_follows_the_content(path: Path) -> None:
    first = LocalFile(path).identity()
    assert LocalFile(path).identity() == first
    os.utime(path, ns=(5, 5))
    assert LocalFile(path).identity() != first
    assert pickle.loads(pickle.dumps(LocalFile(path))).size == 10240


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(Error, match="not a regular file"):
        LocalFile(tmp_path)
    with pytest.raises(Error, match="No such file"):
        LocalFile(tmp_path / "x")


def test_folders(tmp_path: Path) -> None:
    for name in ("a", "sub/b", ".hidden/c", ".d", "1/2/3/e", "1/2/3/4/too-deep", "sub/odd:na\\me"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "round").symlink_to(tmp_path)
    folder = LocalFolder(tmp_path)
    assert folder.names() == ["1/2/3/e", "a", "linked", "sub/b", "sub/odd:na\\me"]
    assert read_bytes(folder.file("sub/odd:na\\me"), 0, 4) == b"sub/"
    for name in ("../x", "/etc/hostname", "sub/../../x"):
        with pytest.raises(FormatError, match="outside its folder"):
            folder.file(name)


@pytest.mark.parametrize("name", ["", "..", "a/..", "/a", "\\a", "a\\b", "c:/a", "a\0"])
def test_names_that_leave(name: str) -> None:
    with pytest.raises(FormatError, match=r"^where: names the file"):
        checked_name(name, "where")


def test_names_that_stay() -> None:
    for name in ("a", "a/b", "a..b", "...", "é"):
        assert checked_name(name, "where") == name
    assert [is_remote(name) for name in ("s3://a", "a", "/a:b", "file:///a")] == [True, False, False, True]


def test_json_bombs() -> None:
    for piece in (b"[],", b"{},", b'"a":1,', b"[[[["):
        with pytest.raises(FormatError, match=r"where: .*describe no tensors"):
            check_json(b"[" + piece * (2_000_000 // len(piece)), "where")
        check_json(b"[" + piece * 1000, "where")
        check_json(b'"' + piece.replace(b'"', b'\\"') * 500_000 + b'"', "where")
    check_json(b'"' * 1_500_001 + b"[" * 100, "where")
