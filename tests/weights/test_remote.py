"""Remote files: ranges, errors that name the address, and targets that are whole or do not look whole."""

from __future__ import annotations

import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch

from weightsmith.errors import Error, FormatError, MissingPackage, OutputError
from weightsmith.weights import _remote
from weightsmith.weights._files import LocalFile, read_bytes
from weightsmith.weights._open import open as open_weights
from weightsmith.weights._remote import RemoteFile, RemoteFolder, find, shown, upload

fsspec = pytest.importorskip("fsspec", reason="remote files need fsspec")


@pytest.fixture
def memory():
    """An empty memory:// file system: like an object store, it cannot rename."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "file"])
def place(request, memory, tmp_path):
    """An address without anything at it, on a system that cannot rename and on one that can."""
    return "memory://bucket/out" if request.param == "memory" else f"file://{tmp_path}/far/out"


@pytest.fixture
def model(tmp_path) -> Path:
    """A finished folder of two shards."""
    folder = tmp_path / "local"
    (folder / "extra").mkdir(parents=True)
    for name, content in {
        "config.json": b"{}",
        "extra/notes.txt": b"n" * 5,
        "model-00001-of-00002.safetensors": b"a" * 100,
        "model-00002-of-00002.safetensors": b"b" * 200,
        "model.safetensors.index.json": b'{"weight_map": {}}',
    }.items():
        (folder / name).write_bytes(content)
    return folder


def contents(url: str) -> dict[str, bytes]:
    system, path = fsspec.core.url_to_fs(url)
    return {found[len(path) :].lstrip("/"): system.cat_file(found) for found in system.find(path)}


def local_contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def failing_put(monkeypatch, system, after: int, message: str = "connection reset"):
    """The put_file of ``system`` leaves half a file and raises, once ``after`` files have been sent."""
    real, sent = type(system).put_file, []

    def put(self, source, target, **options):
        if len(sent) == after:
            self.pipe_file(target, Path(source).read_bytes()[: Path(source).stat().st_size // 2])
            raise OSError(message)
        sent.append(target)
        return real(self, source, target, **options)

    monkeypatch.setattr(type(system), "put_file", put)
    return sent


# Reading


def test_reads_the_same_ranges_as_a_local_file(memory, tmp_path):
    data = bytes(range(256)) * 40
    memory.pipe_file("/a/model.bin", data)
    (tmp_path / "model.bin").write_bytes(data)
    far, near = RemoteFile("memory://a/model.bin"), LocalFile(tmp_path / "model.bin")
    assert far.size == near.size == len(data)
    for offset, nbytes in [(0, 0), (0, 7), (255, 513), (len(data) - 3, 3), (0, len(data))]:
        assert read_bytes(far, offset, nbytes) == data[offset : offset + nbytes]
        assert torch.equal(far.view(offset, nbytes), near.view(offset, nbytes))


def test_a_view_is_memory_of_its_own(memory):
    memory.pipe_file("/a/b", b"1234")
    far = RemoteFile("memory://a/b")
    far.view(0, 4).zero_()
    assert read_bytes(far, 0, 4) == b"1234"


def test_large_reads_are_cut_into_pieces(memory, monkeypatch):
    memory.pipe_file("/a/b", bytes(range(100)))
    asked = []
    real = type(memory).cat_file
    monkeypatch.setattr(_remote, "PIECE", 16)

    def cat(self, path, start=None, end=None, **options):
        asked.append(end - start)
        return real(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(memory), "cat_file", cat)
    assert read_bytes(RemoteFile("memory://a/b"), 10, 50) == bytes(range(10, 60))
    assert asked == [16, 16, 16, 2]


def test_threads_read_side_by_side(memory):
    data = torch.randint(0, 256, (64_000,), dtype=torch.uint8)
    memory.pipe_file("/a/b", data.numpy().tobytes())
    far, wrong = RemoteFile("memory://a/b"), []

    def work(seed: int) -> None:
        for step in range(50):
            start = (seed * 7919 + step * 104729) % 60_000
            if not torch.equal(far.view(start, 4000), data[start : start + 4000]):
                wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_shrank_is_an_error(memory):
    memory.pipe_file("/a/b", bytes(100))
    far = RemoteFile("memory://a/b")
    memory.pipe_file("/a/b", bytes(40))
    with pytest.raises(FormatError, match=r"memory://a/b: ends at byte 40, 20 bytes early"):
        far.read_into(30, memoryview(bytearray(30)))


def test_a_server_without_ranges_is_an_error(memory, monkeypatch):
    memory.pipe_file("/a/b", bytes(100))
    far = RemoteFile("memory://a/b")
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, **_: self.store[path].getvalue())
    with pytest.raises(Error, match="whole files, not ranges"):
        far.read_into(0, memoryview(bytearray(10)))


def test_reading_past_the_end_is_an_error(memory):
    memory.pipe_file("/a/b", bytes(10))
    with pytest.raises(FormatError, match="before byte 12"):
        RemoteFile("memory://a/b").view(8, 4)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (PermissionError("no key"), "not allowed"),
        (FileNotFoundError("x"), "no such file"),
        (RuntimeError("throttled"), "throttled"),
        (NotImplementedError(), "cannot do that"),
    ],
)
def test_failures_name_the_address(memory, monkeypatch, raised, says):
    memory.pipe_file("/a/b", bytes(10))
    far = RemoteFile("memory://a/b")

    def cat(self, path, **options):
        raise raised

    monkeypatch.setattr(type(memory), "cat_file", cat)
    with pytest.raises(Error, match=f"^memory://a/b: .*{says}"):
        read_bytes(far, 0, 4)


def test_secrets_in_an_address_are_not_repeated():
    assert shown("s3://key:secret@bucket/a?X-Signature=1") == "s3://bucket/a"
    with pytest.raises(Error) as caught:
        find("nosuchprotocol://user:hunter2@host/file?token=hunter3")
    assert "hunter" not in str(caught.value)
    assert "nosuchprotocol://host/file" in str(caught.value)


def test_a_missing_address_is_an_error(memory):
    with pytest.raises(Error, match=r"memory://nothing/here: no such file"):
        find("memory://nothing/here")
    with pytest.raises(Error, match="no such file"):
        RemoteFile("memory://nothing/here")


def test_a_folder_is_not_a_file(memory):
    memory.pipe_file("/a/b/c", b"1")
    with pytest.raises(Error, match="a folder, not a file"):
        RemoteFile("memory://a/b")


def test_fsspec_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingPackage, match=r"weightsmith\[remote\]"):
        RemoteFile("s3://bucket/model")


def test_a_missing_part_of_fsspec_says_which(monkeypatch):
    import fsspec.core

    def url_to_fs(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    with pytest.raises(MissingPackage, match=r"s3://bucket/model: Install s3fs"):
        RemoteFile("s3://bucket/model")


def test_identity_changes_with_the_content(memory):
    memory.pipe_file("/a/b", b"1234")
    first, again = RemoteFile("memory://a/b").identity(), RemoteFile("memory://a/b").identity()
    memory.pipe_file("/a/b", b"5678")
    assert first == again
    assert RemoteFile("memory://a/b").identity() != first


def test_a_remote_file_can_be_sent_to_another_process(memory):
    memory.pipe_file("/a/b", b"1234")
    copy = pickle.loads(pickle.dumps(RemoteFile("memory://a/b")))
    assert (copy.name, copy.size, read_bytes(copy, 1, 2)) == ("memory://a/b", 4, b"23")


def test_folders_list_like_local_ones(memory):
    for name in ("w.safetensors", ".hidden", "sub/x.txt", ".git/config", "1/2/3/deep.txt", "1/2/3/4/too_deep.txt"):
        memory.pipe_file(f"/m/{name}", name.encode())
    folder = find("memory://m/")
    assert isinstance(folder, RemoteFolder)
    assert folder.names() == ["1/2/3/deep.txt", "sub/x.txt", "w.safetensors"]
    assert read_bytes(folder.file("sub/x.txt"), 0, 9) == b"sub/x.txt"
    assert folder.file("sub/x.txt").name == "memory://m/sub/x.txt"
    for bad in ("../x", "/etc/passwd", "a\\b", ""):
        with pytest.raises(FormatError, match="outside its folder"):
            folder.file(bad)


def test_weights_open_from_an_address(memory, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="writes the file to be read")
    tensors = {"a": torch.randn(4, 5), "b": torch.arange(7)}
    memory.pipe_file("/m/model.safetensors", safetensors.save(tensors))
    for url in ("memory://m", "memory://m/model.safetensors"):
        weights = open_weights(url)
        assert all(torch.equal(weights[name], tensors[name]) for name in tensors)


# Writing


def test_a_folder_arrives_whole(place, model):
    upload(model, place, overwrite=False)
    assert contents(place) == local_contents(model)
    parent = place.rsplit("/", 1)[0]
    assert all(name.startswith("out/") for name in contents(parent)), "nothing is left beside the target"


def test_a_file_arrives_whole(place, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"x" * 1000)
    upload(source, place + ".gguf")
    assert read_bytes(RemoteFile(place + ".gguf"), 0, 1000) == b"x" * 1000
    assert list(contents(place.rsplit("/", 1)[0])) == ["out.gguf"]


def test_an_existing_target_is_refused(place, model, tmp_path):
    upload(model, place)
    before = contents(place)
    with pytest.raises(OutputError, match=r"out exists; .*overwrite=True"):
        upload(model, place)
    single = tmp_path / "one.safetensors"
    single.write_bytes(b"new")
    with pytest.raises(OutputError, match="is a folder"):
        upload(single, place, overwrite=True)
    upload(single, place + "2")
    with pytest.raises(OutputError, match="exists"):
        upload(single, place + "2")
    with pytest.raises(OutputError, match="is a file"):
        upload(model, place + "2", overwrite=True)
    assert contents(place) == before


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(place, model):
    system, path = fsspec.core.url_to_fs(place)
    system.makedirs(path, exist_ok=True)
    system.pipe_file(f"{path}/thesis.txt", b"precious")
    with pytest.raises(OutputError, match="without weights"):
        upload(model, place, overwrite=True)
    assert contents(place) == {"thesis.txt": b"precious"}


def test_an_empty_folder_is_no_obstacle(model, tmp_path):
    (tmp_path / "far" / "out").mkdir(parents=True)
    upload(model, f"file://{tmp_path}/far/out")
    assert contents(f"file://{tmp_path}/far/out") == local_contents(model)


def test_overwriting_replaces_the_checkpoint_and_keeps_the_rest(place, model, tmp_path):
    upload(model, place)
    system, path = fsspec.core.url_to_fs(place)
    system.pipe_file(f"{path}/README.md", b"mine")
    new = tmp_path / "new"
    new.mkdir()
    (new / "model.safetensors").write_bytes(b"z" * 30)
    (new / "config.json").write_bytes(b'{"new": 1}')
    upload(new, place, overwrite=True)
    assert contents(place) == {
        "README.md": b"mine",
        "extra/notes.txt": b"nnnnn",
        "config.json": b'{"new": 1}',
        "model.safetensors": b"z" * 30,
    }


@pytest.mark.parametrize("after", range(5))
def test_a_failed_sending_leaves_nothing(place, model, monkeypatch, after):
    system, _ = fsspec.core.url_to_fs(place)
    sent = failing_put(monkeypatch, system, after)
    with pytest.raises(OutputError, match=r"out.*: connection reset"):
        upload(model, place)
    assert len(sent) == after
    assert contents(place) == {}
    assert contents(place.rsplit("/", 1)[0]) == {}


@pytest.mark.parametrize("after", range(5))
def test_even_a_killed_sending_does_not_look_whole(memory, model, monkeypatch, after):
    """Nobody tidies up after a power cut: the order of sending alone must protect the reader."""
    monkeypatch.setattr(_remote, "_remove", lambda *_: None)
    failing_put(monkeypatch, memory, after)
    with pytest.raises(OutputError):
        upload(model, "memory://bucket/out")
    left = contents("memory://bucket/out")
    index = "model.safetensors.index.json"
    assert index not in left or left[index] != (model / index).read_bytes()
    if any(name.endswith(".safetensors") for name in left):
        assert "config.json" in left, "companions come before weights"
    with pytest.raises(Error):
        open_weights("memory://bucket/out")


@pytest.mark.parametrize("after", range(5))
def test_a_failed_overwriting_does_not_look_like_either(place, model, monkeypatch, after, tmp_path):
    upload(model, place)
    for file in model.glob("*.safetensors"):
        file.write_bytes(file.read_bytes().upper())
    system, _ = fsspec.core.url_to_fs(place)
    failing_put(monkeypatch, system, after)
    with pytest.raises(OutputError, match="connection reset"):
        upload(model, place, overwrite=True)
    left = contents(place)
    assert not any(name.endswith((".safetensors", ".index.json")) for name in left)
    assert left.get("extra/notes.txt", b"nnnnn") == b"nnnnn", "a torn companion goes, a whole one stays"


def test_a_failed_overwriting_of_a_file_keeps_the_old_one_where_it_can(tmp_path, monkeypatch):
    source = tmp_path / "a.safetensors"
    source.write_bytes(b"old" * 10)
    url = f"file://{tmp_path}/far/a.safetensors"
    upload(source, url)
    source.write_bytes(b"new" * 10)
    system, _ = fsspec.core.url_to_fs(url)
    failing_put(monkeypatch, system, 0)
    with pytest.raises(OutputError, match="connection reset"):
        upload(source, url, overwrite=True)
    assert contents(url.rsplit("/", 1)[0]) == {"a.safetensors": b"old" * 10}


def test_a_store_that_refuses_keeps_the_old_file(memory, tmp_path, monkeypatch):
    source = tmp_path / "a.safetensors"
    source.write_bytes(b"old" * 10)
    upload(source, "memory://bucket/a.safetensors")
    source.write_bytes(b"new" * 10)

    def put(self, *_, **__):
        raise PermissionError("read-only key")

    monkeypatch.setattr(type(memory), "put_file", put)
    with pytest.raises(OutputError, match=r"memory://bucket/a.safetensors: not allowed \(read-only key\)"):
        upload(source, "memory://bucket/a.safetensors", overwrite=True)
    assert contents("memory://bucket") == {"a.safetensors": b"old" * 10}


def test_an_error_while_looking_is_not_taken_for_absence(memory, model, monkeypatch):
    upload(model, "memory://bucket/out")

    def info(self, path, **_):
        raise PermissionError("may not look")

    monkeypatch.setattr(type(memory), "info", info)
    with pytest.raises(OutputError, match="not allowed"):
        upload(model, "memory://bucket/out", overwrite=False)


def test_a_short_arrival_is_an_error(memory, model, monkeypatch):
    def put(self, source, target, **_):
        self.pipe_file(target, Path(source).read_bytes()[:-1])

    monkeypatch.setattr(type(memory), "put_file", put)
    with pytest.raises(OutputError, match=r"config.json: 1 of 2 bytes arrived"):
        upload(model, "memory://bucket/out")
    assert contents("memory://bucket") == {}


def test_nothing_to_send_is_an_error(memory, tmp_path):
    with pytest.raises(Error, match="no such file or folder"):
        upload(tmp_path / "missing", "memory://bucket/out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Error, match="nothing to send"):
        upload(tmp_path / "empty", "memory://bucket/out")


def test_progress_counts_every_byte(memory, model):
    from weightsmith import progress

    seen = []
    with progress.listening(seen.append):
        upload(model, "memory://bucket/out")
    total = sum(len(content) for content in local_contents(model).values())
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (total, total, "bytes")
