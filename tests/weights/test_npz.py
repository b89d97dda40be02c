"""numpy archives: np.savez to us, us to np.load, and what lies is refused."""

from __future__ import annotations

import io
import json
import random
import time
import tracemalloc
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightsmith.errors import Error, FormatError
from weightsmith.weights import _npz
from weightsmith.weights._files import LocalFile
from weightsmith.weights._lazy import Scratch, Stored, materialize
from weightsmith.weights._npz import Packed, layout, read
from weightsmith.weights._spec import Spec
from weightsmith.weights._strided import Strided

CODES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"]
SAVERS = pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "packed"])


def saved(folder: Path, save: Any, **arrays: Any) -> LocalFile:
    save(folder / "model.npz", **arrays)
    return LocalFile(folder / "model.npz")


def archive_of(folder: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> LocalFile:
    with zipfile.ZipFile(folder / "hostile.npz", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return LocalFile(folder / "hostile.npz")


def npy(header: str, values: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + values


@SAVERS
def test_every_dtype(tmp_path: Path, save: Any) -> None:
    raw = np.random.default_rng(0).integers(0, 2, 16 * 12, dtype=np.uint8)
    arrays = {code: raw[: 12 * np.dtype(code).itemsize].view(code).reshape(3, 4) for code in CODES}
    nodes = read(saved(tmp_path, save, **arrays)).nodes
    assert list(nodes) == CODES
    for code, array in arrays.items():
        found = materialize(nodes[code]).numpy()
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()


@SAVERS
def test_every_layout_of_values(tmp_path: Path, save: Any) -> None:
    base = np.arange(24.0).reshape(2, 3, 4)
    arrays = {
        "base": base,
        "fortran": np.asfortranarray(base),
        "view": base[:, 1:, ::2],
        "scalar": np.float32(3),
        "empty": np.zeros((0, 5)),
        "long": np.tile(np.arange(1000.0), 600),
        "noise": np.random.default_rng(0).normal(size=200_000),
    }
    nodes = read(saved(tmp_path, save, **arrays)).nodes
    for name, array in arrays.items():
        assert np.array_equal(materialize(nodes[name]).numpy(), array), name
        assert nodes[name].spec.shape == array.shape


def test_stored_arrays_are_ranges_of_the_file_and_packed_ones_are_not(tmp_path: Path) -> None:
    base = np.arange(600.0).reshape(20, 30)
    nodes = read(saved(tmp_path, np.savez, c=base, f=np.asfortranarray(base))).nodes
    assert isinstance(nodes["c"], Stored)
    assert isinstance(nodes["f"], Strided)
    assert nodes["c"].read(7, 9, Scratch()).tolist() == [7.0, 8.0]
    packed = read(saved(tmp_path, np.savez_compressed, c=base, f=np.asfortranarray(base))).nodes
    assert isinstance(packed["c"], Packed)
    assert isinstance(packed["f"], Packed)


@SAVERS
@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.array([{}], dtype=object), "array of Python objects"),
        (np.array(["text"]), "numpy's dtype <U4"),
        (np.arange(3, dtype=">i4"), r"numpy's dtype >i4.*newbyteorder\('<'\)"),
        (np.zeros(2, dtype=[("a", "f4"), ("b", "i8")]), "numpy's dtype"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "numpy's dtype"),
    ],
)
def test_other_arrays_are_refused_by_name(tmp_path: Path, save: Any, array: Any, match: str) -> None:
    with pytest.raises(FormatError, match=rf"model\.npz: tensor 'bad'.*{match}"):
        read(saved(tmp_path, save, bad=array))


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "packed"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy(HEADER, bytes(20)), "is 24 bytes, its member has 20"),
        (npy(HEADER, bytes(28)), "is 24 bytes, its member has 28"),
        (npy(HEADER.replace("(2, 3)", "(2, -3)"), bytes(24)), "no valid shape"),
        (npy(HEADER.replace("(2, 3)", "(True, 6)"), bytes(24)), "no valid shape"),
        (npy(HEADER.replace("(2, 3)", "(2**9, 3)"), bytes(24)), "no readable header"),
        (npy(HEADER.replace("(2, 3)", f"({2**62}, {2**62}, 0)")), "which no tensor|that no tensor"),
        (npy(HEADER.replace("(2, 3)", "[2, 3]"), bytes(24)), "no readable header"),
        (npy(HEADER.replace("'<f4'", "'<f4,<f4'"), bytes(48)), "numpy's dtype"),
        (npy(HEADER.replace("'<f4'", "__import__('os')"), bytes(24)), "no readable header"),
        (npy("(" * 5000), "no readable header"),
        (npy(HEADER, bytes(24), b"\7\0"), "no readable header"),
        (b"\x93NUMPY", "no readable header"),
        (b"", "no readable header"),
        (b"hello" * 20, "no readable header"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, method: int, content: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=rf"hostile\.npz: tensor 'x'.*({match})"):
        read(archive_of(tmp_path, {"x.npy": content}, method))


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="it has no arrays"):
        read(archive_of(tmp_path, {"data.pkl": b""}))
    with pytest.raises(FormatError, match="method 12"):
        read(archive_of(tmp_path, {"x.npy": npy(HEADER, bytes(24))}, zipfile.ZIP_BZIP2))
    (tmp_path / "hostile.npz").write_bytes(b"no zip")
    with pytest.raises(FormatError, match="truncated"):
        read(LocalFile(tmp_path / "hostile.npz"))


def relabelled(folder: Path, content: bytes, size: int, crc: int | None = None) -> LocalFile:
    """An archive with one packed member, whose table of contents claims another size."""
    file = archive_of(folder, {"x.npy": content}, zipfile.ZIP_DEFLATED)
    raw = bytearray(Path(file.name).read_bytes())
    entry = raw.rindex(b"PK\1\2")
    raw[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    if crc is not None:
        raw[entry + 16 : entry + 20] = crc.to_bytes(4, "little")
    Path(file.name).write_bytes(raw)
    return LocalFile(file.name)


def test_bombs_are_refused(tmp_path: Path) -> None:
    header = HEADER.replace("(2, 3)", f"({2**28},)")
    claims = relabelled(tmp_path, npy(header, bytes(1000)), len(npy(header)) + 2**30)
    with pytest.raises(FormatError, match=r"claims that .* bytes unpack to"):
        read(claims)
    # Says that it is short, and is not: unpacking stops where it should end.
    longer = read(relabelled(tmp_path, npy(HEADER, bytes(2**26)), len(npy(HEADER)) + 24)).nodes["x"]
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with pytest.raises(FormatError, match=r"hostile\.npz: tensor 'x' unpacks to more than it says"):
            materialize(longer)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        assert time.perf_counter() - begun < 5
    finally:
        tracemalloc.stop()


def test_damaged_values_are_found_when_they_are_unpacked(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="tensor 'x' is damaged"):
        materialize(read(relabelled(tmp_path, npy(HEADER, bytes(24)), len(npy(HEADER)) + 24, crc=1)).nodes["x"])
    shorter = relabelled(tmp_path, npy(HEADER, bytes(20)), len(npy(HEADER)) + 24)
    with pytest.raises(FormatError, match="tensor 'x' is damaged"):
        materialize(read(shorter).nodes["x"])


def written(folder: Path, tensors: Mapping[str, Tensor], ties: Mapping[str, str], metadata: Mapping[str, str]) -> Path:
    """What the engine does with a layout."""
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items() if name not in ties}
    made = layout(specs, ties, metadata, "out.npz", list(tensors))
    path = folder / made.files[0].name
    with open(path, "wb") as file:
        file.truncate(made.files[0].size)
        for offset, raw in made.files[0].fixed:
            file.seek(offset)
            file.write(raw)
        for name in reversed(specs):
            file.seek(made.places[name][1])
            file.write(tensors[name].numpy().tobytes())
    assert made.finish is not None
    made.finish(folder)
    return path


def test_numpy_loads_what_we_write(tmp_path: Path) -> None:
    dtypes = {code: getattr(torch, np.dtype(code).name) for code in CODES}
    tensors = {code: torch.arange(6).to(torch.float32).to(dtype).reshape(2, 3) for code, dtype in dtypes.items()}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "a/b.c": torch.ones(2)}
    tensors = {"tied": tensors["f4"], **tensors}
    path = written(tmp_path, tensors, {"tied": "f4"}, {"lineage": "ü"})
    with np.load(path) as loaded:
        assert loaded.files == list(tensors)
        for name, tensor in tensors.items():
            assert np.array_equal(loaded[name], tensor.numpy()), name
            assert loaded[name].dtype == tensor.numpy().dtype
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    contents = read(LocalFile(path))
    assert list(contents.nodes) == list(tensors)
    assert all(torch.equal(materialize(contents.nodes[name]), tensor) for name, tensor in tensors.items())
    assert contents.nodes["tied"] is contents.nodes["f4"]
    assert contents.nodes["tied"] is not contents.nodes["f8"]
    assert contents.metadata == {"lineage": "ü"}


def test_a_tie_that_is_a_lie_is_none(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": torch.ones(2), "b": torch.zeros(2), "c": torch.ones(2, 1)}, {}, {})
    claims = {"weightsmith": {"metadata": {}, "ties": {"b": "a", "nothing": "a", "a": "nothing"}}}
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps(claims).encode()
    nodes = read(LocalFile(path)).nodes
    assert {name: materialize(node).tolist() for name, node in nodes.items()} == {
        "a": [1.0, 1.0],
        "b": [0.0, 0.0],
        "c": [[1.0], [1.0]],
    }


@pytest.mark.parametrize(
    "comment",
    [b"hello", b"[]", b'{"weightsmith": 1}', b"[" * 50_000, b"\xff", b'{"weightsmith": {"metadata": [], "ties": {}}}'],
)
def test_other_comments_say_nothing(tmp_path: Path, comment: bytes) -> None:
    path = Path(saved(tmp_path, np.savez, a=np.ones(2)).name)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    contents = read(LocalFile(path))
    assert contents.metadata == {}
    assert list(contents.nodes) == ["a"]


def test_metadata_that_does_not_fit_is_left_out_longest_first(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": torch.ones(2)}, {}, {"long": "x" * 70_000, "short": "y", "middle": "z" * 1000})
    assert read(LocalFile(path)).metadata == {"short": "y", "middle": "z" * 1000}


def test_what_numpy_does_not_have_is_refused() -> None:
    with pytest.raises(Error, match="tensor w: numpy has no dtype for bfloat16; cast it to float32 first"):
        layout({"w": Spec((1,), torch.bfloat16)}, {}, {}, "x.npz")
    specs = {"a": Spec((1,), torch.float32)}
    with pytest.raises(Error, match="must name each"):
        layout(specs, {"b": "a"}, {}, "x.npz", ["b"])
    with pytest.raises(Error, match="unknown tensor aa"):
        layout(specs, {"b": "aa"}, {}, "x.npz")
    with pytest.raises(Error, match="no room for 9000 ties"):
        layout(specs, {f"b{n}": "a" for n in range(9000)}, {}, "x.npz")


@pytest.fixture(scope="module")
def valid() -> list[bytes]:
    files = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        base = np.arange(6.0).reshape(2, 3)
        save(stream, a=base, b=np.asfortranarray(base), c=np.float16(1))
        files.append(stream.getvalue())
    return files


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 1), seed=st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused(tmp_path: Path, valid: list[bytes], which: int, seed: int) -> None:
    chance, path = random.Random(seed), tmp_path / "mutated.npz"
    for _ in range(5):
        content = bytearray(valid[which])
        for _ in range(chance.choice((1, 1, 2, 5))):
            at, length = chance.randrange(len(content) + 1), chance.choice((0, 1, 2, 8))
            content[at : at + length] = chance.choice(
                (b"", chance.randbytes(length), b"\xff" * length, chance.randbytes(2))
            )
        path.write_bytes(content)
        try:
            nodes = read(LocalFile(path)).nodes
            sizes = [materialize(node).nbytes for node in nodes.values() if node.spec.numel < 100_000]
            refusal = None
        except Error as error:
            sizes, refusal = [], str(error)
        assert all(size >= 0 for size in sizes)
        assert refusal is None or refusal.startswith(str(path))


def test_the_ratio_that_packing_can_reach_is_allowed(tmp_path: Path) -> None:
    zeros = np.zeros(2**21, dtype=np.uint8)
    node = read(saved(tmp_path, np.savez_compressed, zeros=zeros)).nodes["zeros"]
    assert not materialize(node).any()
    assert _npz.LARGEST_RATIO > 1000
