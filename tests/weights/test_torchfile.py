"""PyTorch files: what torch.save writes we read, what we write torch.load reads, and nothing is run."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import json
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightsmith.errors import Error, FormatError
from weightsmith.weights import _torchfile
from weightsmith.weights._files import LocalFile
from weightsmith.weights._layout import Contents
from weightsmith.weights._lazy import Scratch, Stored, materialize
from weightsmith.weights._spec import Spec
from weightsmith.weights._strided import Strided
from weightsmith.weights._torchfile import OPAQUE, layout, read

NAMES = [
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]
FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def sample(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bytes but those that are no truth value."""
    nbytes = Spec(tuple(shape), dtype).nbytes
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit by bit, so that not-a-number equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def saved(folder: Path, value: Any, new: bool = True, **options: Any) -> LocalFile:
    path = folder / "model.pt"
    torch.save(value, path, _use_new_zipfile_serialization=new, **options)
    return LocalFile(path)


def in_chunks(node: Any, grains: int) -> Tensor:
    step, scratch = node.grain * grains, Scratch()
    parts = []
    for start in range(0, node.spec.numel, step):
        scratch.next_chunk()
        parts.append(node.read(start, min(start + step, node.spec.numel), scratch).clone())
    return torch.cat(parts).reshape(node.spec.shape)


def check(contents: Contents, expected: Mapping[str, Tensor]) -> None:
    assert list(contents.nodes) == list(expected)
    for name, tensor in expected.items():
        node = contents.nodes[name]
        assert node.spec == Spec(tuple(tensor.shape), tensor.dtype)
        assert same(materialize(node), tensor.detach()), name


# Reading what torch.save writes


@FORMATS
def test_every_dtype(tmp_path: Path, new: bool) -> None:
    tensors = {str(dtype): sample((3, 4), dtype) for dtype in DTYPES}
    check(read(saved(tmp_path, tensors, new)), tensors)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path: Path, new: bool, protocol: int) -> None:
    tensors = {"a": torch.arange(3.0), "b": nn.Parameter(torch.ones(2))}
    check(read(saved(tmp_path, tensors, new, pickle_protocol=protocol)), tensors)


@FORMATS
def test_every_layout_of_values(tmp_path: Path, new: bool) -> None:
    base = torch.arange(240.0).reshape(2, 4, 5, 6)
    tensors = {
        "whole": base,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "inner": base[1, 2:],
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "channels_last": base.to(memory_format=torch.channels_last),
        "column": torch.arange(12.0).reshape(3, 4)[:, 1],
        "columns": torch.arange(12.0).reshape(3, 4)[:, 1:3],
        "steps": torch.arange(20)[3::4],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "repeated": torch.tensor([1.0, 2.0, 3.0]).expand(4, 3),
        "number": torch.tensor(7, dtype=torch.int64).expand(2, 2),
        "permuted": base.permute(3, 0, 2, 1),
        "windows": torch.arange(8.0).unfold(0, 4, 2),
        "ones": torch.ones(1, 1, 1).expand(1, 1, 1),
        "narrow": sample((4, 6), torch.float8_e5m2).t(),
        "complex": sample((4, 6), torch.complex128).t(),
    }
    contents = read(saved(tmp_path, tensors, new))
    check(contents, tensors)
    for name, tensor in tensors.items():
        for grains in (1, 2, 3):
            if tensor.numel():
                assert same(in_chunks(contents.nodes[name], grains), tensor), (name, grains)


def test_contiguous_tensors_are_ranges_of_the_file(tmp_path: Path) -> None:
    base = torch.arange(96.0).reshape(12, 8)
    nodes = read(saved(tmp_path, {"a": base, "b": base[1:], "c": base.t(), "d": base[:, :1]})).nodes
    assert [type(node) for node in nodes.values()] == [Stored, Stored, Strided, Strided]
    assert nodes["a"].offset + 32 == nodes["b"].offset
    assert nodes["a"].offset % 64 == 0
    assert (nodes["c"].grain, nodes["d"].grain) == (96, 1)


def test_rows_far_apart_are_read_without_the_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Strided, "RUN", 100)
    table = torch.arange(30_000.0).reshape(300, 100)
    node = read(saved(tmp_path, {"column": table[:, 7:9]})).nodes["column"]
    asked: list[int] = []
    real = LocalFile.read_into

    def watched(self: LocalFile, offset: int, buffer: memoryview) -> None:
        asked.append(len(buffer))
        real(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", watched)
    assert torch.equal(materialize(node), table[:, 7:9])
    assert max(asked) <= 4 * 100


@FORMATS
def test_tied_tensors_share_a_node(tmp_path: Path, new: bool) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": shared,
        "b": shared,
        "c": shared.view(2, 3),
        "d": shared.t(),
        "e": shared.t(),
        "f": shared.view(3, 2),
        "g": shared.clone(),
    }
    nodes = read(saved(tmp_path, tensors, new)).nodes
    assert nodes["a"] is nodes["b"] is nodes["c"]
    assert nodes["d"] is nodes["e"]
    assert len({id(node) for node in nodes.values()}) == 4


@FORMATS
def test_modules_and_parameters(tmp_path: Path, new: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 1, bias=False)))
    module[0].register_buffer("passing", torch.ones(1), persistent=False)
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "with a state of its own"  # type: ignore[attr-defined]
    attributed = torch.ones(3)
    attributed.note = 1  # type: ignore[attr-defined]
    check(read(saved(tmp_path, module.state_dict(), new)), module.state_dict())
    check(read(saved(tmp_path, [parameter, attributed], new)), {"0": parameter, "1": attributed})
    contents = read(saved(tmp_path, module, new))
    check(contents, module.state_dict())
    assert json.loads(contents.metadata[OPAQUE])[""] == "torch.nn.modules.container.Sequential"
    check(read(saved(tmp_path, {"model": module}, new), at="model"), module.state_dict())


@FORMATS
def test_optimizers(tmp_path: Path, new: bool) -> None:
    module = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.25)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    contents = read(saved(tmp_path, {"epoch": 3, "optimizer": optimizer.state_dict()}, new))
    state = optimizer.state_dict()["state"]
    check(contents, {f"optimizer.state.{i}.{key}": state[i][key] for i in (0, 1) for key in state[i]})
    assert contents.metadata["epoch"] == "3"
    assert contents.metadata["optimizer.param_groups.0.lr"] == "0.25"
    assert contents.metadata["optimizer.param_groups.0.amsgrad"] == "false"
    assert "optimizer.param_groups.0.foreach" not in contents.metadata


class Schedule(enum.Enum):
    COSINE = "cosine"


class Callback:
    def __init__(self) -> None:
        self.best, self.weights = 0.5, torch.arange(4.0)


@FORMATS
def test_a_checkpoint_with_objects_in_it(tmp_path: Path, new: bool) -> None:
    checkpoint = {
        "state_dict": collections.OrderedDict({"layer.weight": torch.ones(2, 2)}),
        "hyper_parameters": argparse.Namespace(lr=0.1, name="run", schedule=Schedule.COSINE),
        "callbacks": {"best": Callback()},
        "loops": [1, 2.5, True, None, "text", "x" * 5000, float("inf")],
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]),
        7: {"seven": torch.tensor(7)},
        "numpy": {"array": np.arange(6.0).reshape(2, 3), "big": np.arange(3, dtype=">i2"), "scalar": np.float32(1.5)},
    }
    contents = read(saved(tmp_path, checkpoint, new))
    check(
        contents,
        {
            "state_dict.layer.weight": torch.ones(2, 2),
            "callbacks.best.weights": torch.arange(4.0),
            "7.seven": torch.tensor(7),
            "numpy.array": torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
            "numpy.big": torch.arange(3, dtype=torch.int16),
        },
    )
    opaque = json.loads(contents.metadata.pop(OPAQUE))
    assert opaque["hyper_parameters"] == "argparse.Namespace"
    assert opaque["hyper_parameters.schedule"].endswith("Schedule")
    assert opaque["callbacks.best"].endswith("Callback")
    assert opaque["dtype"] == "torch.bfloat16"
    assert contents.metadata == {
        "hyper_parameters.lr": "0.1",
        "hyper_parameters.name": '"run"',
        "callbacks.best.best": "0.5",
        "loops.0": "1",
        "loops.1": "2.5",
        "loops.2": "true",
        "loops.4": '"text"',
        "loops.6": '"inf"',
        "device": '"cuda:1"',
        "size.0": "2",
        "size.1": "3",
        "numpy.scalar": "1.5",
    }


def test_a_bare_tensor_and_a_bare_storage(tmp_path: Path) -> None:
    check(read(saved(tmp_path, torch.arange(3))), {"tensor": torch.arange(3)})
    raw = torch.arange(3, dtype=torch.uint8)
    check(read(saved(tmp_path, {"s": raw.untyped_storage()})), {"s": raw})


def test_one_part_of_a_checkpoint(tmp_path: Path) -> None:
    tree = {"model": {"a.b": {"w": torch.ones(1)}, "a": {"v": torch.ones(2)}, "x/y": [{"z": torch.ones(3)}]}, "n": 1}
    file = saved(tmp_path, tree)
    assert list(read(file, at="model").nodes) == ["a.b.w", "a.v", "x/y.0.z"]
    assert list(read(file, at="model.a.b").nodes) == ["w"]
    assert list(read(file, at="model/a").nodes) == ["v"]
    assert list(read(file, at="model.x/y.0").nodes) == ["z"]
    assert list(read(file, at="").nodes) == ["model.a.b.w", "model.a.v", "model.x/y.0.z"]
    with pytest.raises(Error, match=r"model.pt: nothing at 'modle' \(did you mean 'model'\?\)"):
        read(file, at="modle")
    with pytest.raises(Error, match=r"nothing at 'model.c'.*it has a.b, a, x/y"):
        read(file, at="model.c")
    with pytest.raises(Error, match=r"'model\.a\.v' is no dictionary but a tensor"):
        read(file, at="model.a.v")


# What cannot be read is refused, and nothing is run


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@FORMATS
def test_nothing_is_ever_run(tmp_path: Path, new: bool) -> None:
    contents = read(saved(tmp_path, {"w": torch.ones(2), "evil": Payload(tmp_path / "ran")}, new))
    check(contents, {"w": torch.ones(2)})
    assert json.loads(contents.metadata[OPAQUE]) == {"evil": f"{os.system.__module__}.system"}
    assert not (tmp_path / "ran").exists()


class Holder:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return Holder, (self.tensor,)


@FORMATS
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.eye(3).to_sparse(), "'bad' is made by torch._utils._rebuild_sparse_tensor"),
        (lambda: Holder(torch.ones(2)), "'bad' is made by .*Holder, which cannot be read .* save its state_dict"),
        (lambda: {"deep": [Holder(torch.ones(2))]}, "'bad.deep.0' is made by .*Holder"),
        (lambda: torch.empty(3, device="meta"), "tensor 'bad' is on the meta device"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "tensor 'bad' is yet to be conjugated"),
        (lambda: np.array(["a", "b"]), "tensor 'bad' is a numpy array of objects or texts"),
        (lambda: np.array([{}], dtype=object), "tensor 'bad' is a numpy array of objects or texts"),
    ],
)
def test_tensors_that_need_code_are_refused_by_name(tmp_path: Path, new: bool, make: Any, match: str) -> None:
    with pytest.raises(FormatError, match=f"model.pt: .*{match}"):
        read(saved(tmp_path, {"good": torch.ones(1), "bad": make()}, new))


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_refused_by_name(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(FormatError, match=r"'bad' is made by torch\._utils\._rebuild_qtensor"):
        read(saved(tmp_path, {"bad": quantized}))


@pytest.mark.filterwarnings("ignore")
def test_programs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(FormatError, match="TorchScript"):
        read(LocalFile(path))


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"would be called 'a.b'"):
        read(saved(tmp_path, {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}))
    with pytest.raises(FormatError, match="would be called '1'"):
        read(saved(tmp_path, {1: 2.0, "1": torch.ones(1)}))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it is empty"),
        (b"hello", "begins with b'hello'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (pickle.dumps({"a": 1}), "none that torch.save wrote"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar archive"),
        (b"PK\3\4", "truncated"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", "truncated"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(FormatError, match=rf"other\.bin: .*{match}"):
        read(LocalFile(tmp_path / "other.bin"))


# Hostile files


def repacked(
    folder: Path,
    change: Callable[[dict[str, bytes]], None],
    value: Any = None,
    method: int = zipfile.ZIP_STORED,
) -> LocalFile:
    """A file of torch.save with other members."""
    stream = io.BytesIO()
    torch.save({"w": torch.arange(6.0).reshape(2, 3)} if value is None else value, stream)
    with zipfile.ZipFile(stream) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    path = folder / "hostile.pt"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return LocalFile(path)


def with_pickle(folder: Path, content: bytes) -> LocalFile:
    return repacked(folder, lambda members: members.update({"archive/data.pkl": b"\x80\x02" + content + b"."}))


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + raw


def view(offset: int, size: Sequence[int], stride: Sequence[int]) -> bytes:
    """The pickle of {"w": a view of six floats}."""
    lists = [b"(" + b"".join(map(number, items)) + b"t" for items in (size, stride)]
    return b"}X\x01\x00\x00\x00w" + VIEW + number(offset) + b"".join(lists) + b"\x89}tRs"


def test_views_inside_their_storage_are_read(tmp_path: Path) -> None:
    check(read(with_pickle(tmp_path, view(1, [2, 2], [3, 1]))), {"w": torch.tensor([[1.0, 2.0], [4.0, 5.0]])})
    check(read(with_pickle(tmp_path, view(5, [2], [0]))), {"w": torch.tensor([5.0, 5.0])})
    check(read(with_pickle(tmp_path, view(0, [0, 4], [4, 1]))), {"w": torch.empty(0, 4)})
    check(read(with_pickle(tmp_path, view(0, [1, 6], [2**62, 1]))), {"w": torch.arange(6.0).reshape(1, 6)})


@pytest.mark.parametrize(
    ("offset", "size", "stride", "match"),
    [
        (0, [7], [1], "reach beyond"),
        (1, [6], [1], "reach beyond"),
        (0, [2, 3], [4, 1], "reach beyond"),
        (0, [2**30], [1], "reach beyond"),
        (0, [2], [2**62], "reach beyond"),
        (2**63 - 1, [1], [1], "reach beyond"),
        (-1, [1], [1], "no valid offset"),
        (0, [-1], [1], "no valid storage, size or strides"),
        (5, [2], [-1], "no valid storage, size or strides"),
        (0, [2, 3], [1], "no valid storage, size or strides"),
        (0, [2**63], [0], "no valid storage, size or strides"),
        (0, [1] * 65, [1] * 65, "no valid storage, size or strides"),
        (0, [2**41], [0], "which no tensor has"),
        (0, [2**40, 2**40, 0], [0, 0, 0], "which no tensor has"),
        (0, [2**35], [0], "repeats 24 bytes to"),
    ],
)
def test_views_beyond_their_storage_are_refused(
    tmp_path: Path, offset: int, size: list[int], stride: list[int], match: str
) -> None:
    with pytest.raises(FormatError, match=rf"hostile\.pt: tensor 'w'.*{match}"):
        read(with_pickle(tmp_path, view(offset, size, stride)))


def test_a_long_expansion_is_never_held_whole(tmp_path: Path) -> None:
    node = read(with_pickle(tmp_path, view(0, [2**33, 2], [0, 1]))).nodes["w"]
    tracemalloc.start()
    try:
        assert node.read(2**33, 2**33 + 4, Scratch()).tolist() == [0.0, 1.0, 0.0, 1.0]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_view_of_what_is_no_storage_is_refused(tmp_path: Path) -> None:
    content = view(0, [2], [1])
    with pytest.raises(FormatError, match="no valid storage"):
        read(with_pickle(tmp_path, content.replace(b"Q", b"", 1)))
    with pytest.raises(FormatError, match="no member 'archive/data/9'"):
        read(with_pickle(tmp_path, content.replace(b"\x00\x00\x000X", b"\x00\x00\x009X")))
    with pytest.raises(FormatError, match=r"no member 'archive/data/\.\./'"):
        read(with_pickle(tmp_path, content.replace(b"X\x01\x00\x00\x000X", b"X\x03\x00\x00\x00../X")))
    with pytest.raises(FormatError, match=r"storage of the kind torch\.EvilStorage"):
        read(with_pickle(tmp_path, content.replace(b"FloatStorage", b"EvilStorage")))
    with pytest.raises(FormatError, match="that is no storage"):
        read(with_pickle(tmp_path, content.replace(b"storagectorch", b"modulesctorch")))
    with pytest.raises(FormatError, match=r"hostile\.pt: .*_rebuild_tensor_v2 that cannot be"):
        read(with_pickle(tmp_path, b"ctorch._utils\n_rebuild_tensor_v2\n)R"))


def test_tensors_inside_the_state_of_a_subclass_are_not_left_out(tmp_path: Path) -> None:
    wrapper = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\nca\nB\n)"
    with pytest.raises(FormatError, match=r"'0' is made by torch\._utils\._rebuild_wrapper_subclass"):
        read(with_pickle(tmp_path, b"]" + wrapper + view(0, [2], [1]) + b"tRa"))
    plain = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nca\nB\n"
    inner = view(0, [2], [1]).split(b"_rebuild_tensor_v2\n")[1].removesuffix(b"Rs")
    check(read(with_pickle(tmp_path, b"]" + plain + inner + b"NtRa")), {"0": torch.tensor([0.0, 1.0])})


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"'archive/.*' is compressed.*zip -0"):
        read(repacked(tmp_path, lambda members: None, {"w": torch.zeros(1000)}, zipfile.ZIP_DEFLATED))


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no archive/data\.pkl"):
        read(repacked(tmp_path, lambda members: members.pop("archive/data.pkl") and None))
    with pytest.raises(FormatError, match="no member 'archive/data/0'"):
        read(repacked(tmp_path, lambda members: members.pop("archive/data/0") and None))
    with pytest.raises(FormatError, match="big-endian"):
        read(repacked(tmp_path, lambda members: members.update({"archive/byteorder": b"big"})))
    with pytest.raises(FormatError, match=r"'archive/byteorder' has 1000 bytes"):
        read(repacked(tmp_path, lambda members: members.update({"archive/byteorder": b"l" * 1000})))
    with pytest.raises(FormatError, match="reach beyond"):
        read(repacked(tmp_path, lambda members: members.update({"archive/data/0": b"\0" * 20})))
    with pytest.raises(FormatError, match="must map words to words"):
        read(repacked(tmp_path, lambda members: members.update({"archive/extra/weightsmith.json": b"[" * 9999})))


def test_a_pickle_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torchfile, "LARGEST_PICKLE", 100)
    with pytest.raises(FormatError, match="at most 100 are read"):
        read(saved(tmp_path, {"w": torch.ones(1)}))


def bounded(file: LocalFile, match: str, megabytes: int = 64, seconds: float = 10) -> None:
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with pytest.raises(FormatError, match=match):
            read(file)
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
        assert time.perf_counter() - begun < seconds
    finally:
        tracemalloc.stop()


def test_shared_parts_that_explode_are_refused(tmp_path: Path) -> None:
    lists = b"](K\x01K\x02e" + b"q\x00](h\x00h\x00h\x00h\x00e" * 40
    bounded(with_pickle(tmp_path, lists), "repeats its parts")
    tensors = view(0, [2], [1]) + b"q\x00](h\x00h\x00h\x00h\x00e" * 40
    bounded(with_pickle(tmp_path, tensors), "repeats its parts")
    objects = b")q\x00" + b"ca\nb\n(h\x00h\x00h\x00tRq\x00" * 200
    assert read(with_pickle(tmp_path, objects)).nodes == {}


def test_long_names_that_explode_are_refused(tmp_path: Path) -> None:
    key = b"X" + struct.pack("<I", 100_000) + b"k" * 100_000 + b"q\x000"
    values = view(0, [2], [1]) + b"q\x010](" + b"h\x01" * 5000 + b"eq\x020"
    bounded(with_pickle(tmp_path, key + values + b"}h\x00h\x02s"), "repeats its parts")


def test_what_contains_itself_is_refused(tmp_path: Path) -> None:
    bounded(with_pickle(tmp_path, b"]q\x00h\x00a"), "'0' contains itself")
    bounded(with_pickle(tmp_path, b"}q\x00X\x01\x00\x00\x00a}q\x01X\x01\x00\x00\x00bh\x00ss"), r"'a.b' contains itself")
    bounded(with_pickle(tmp_path, b"ca\nb\n)Rq\x00}X\x01\x00\x00\x00ah\x00sb"), "'a' contains itself")


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    bounded(with_pickle(tmp_path, b"]" * 2000 + b"a" * 1999), "nests more than 1000 levels")
    inner = b"]" * 900 + b"a" * 899
    assert read(with_pickle(tmp_path, inner)).nodes == {}


def test_endless_values_are_not_written_into_messages(tmp_path: Path) -> None:
    laughs = b")" + b"2\x86" * 60
    bounded(with_pickle(tmp_path, view(0, [2], [1]).replace(b"ctorch\nFloatStorage\n", laughs)), "of the kind tuple")
    typed = view(0, [2], [1]).replace(b"_v2", b"_v3").replace(b"\x89}tR", b"\x89}" + laughs + b"tR")
    bounded(with_pickle(tmp_path, typed), "has the dtype tuple")
    assert read(with_pickle(tmp_path, b"ctorch\ndevice\n" + laughs + b"\x85R")).nodes == {}
    bounded(with_pickle(tmp_path, b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R(K\x03" + laughs + b"tb"), "no byte order")


def test_modules_that_are_walked_again_and_again_are_refused(tmp_path: Path) -> None:
    passing = b"](" + b"".join(b"X\x04\x00\x00\x00%04d" % n for n in range(5000)) + b"e"
    keys = [b"X" + struct.pack("<I", len(k)) + k for k in (b"_parameters", b"_modules", b"_non_persistent_buffers_set")]
    module = b"ca\nb\n)R}(" + keys[0] + b"}" + keys[1] + b"}" + keys[2] + passing + b"ub"
    bounded(with_pickle(tmp_path, module + b"q\x000](" + b"h\x00" * 30_000 + b"e"), "repeats its parts")


def test_arrays_that_copy_the_same_bytes_are_refused(tmp_path: Path) -> None:
    raw = b"B" + struct.pack("<I", 2**20) + bytes(2**20) + b"q\x000"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85Rq\x010"
    shape = number(2**20) + b"\x85"
    array = b"cnumpy._core.multiarray\n_reconstruct\n)R(K\x01" + shape + b"h\x01\x89h\x00tb"
    check(read(with_pickle(tmp_path, raw + dtype + array)), {"tensor": torch.zeros(2**20, dtype=torch.uint8)})
    bounded(with_pickle(tmp_path, raw + dtype + b"](" + array * 200 + b"e"), "repeats its parts")


def test_settings_in_metadata_are_bounded(tmp_path: Path) -> None:
    contents = read(saved(tmp_path, {"losses": list(range(20_000)), "w": torch.ones(1)}))
    assert len(contents.metadata) == 10_000
    assert list(contents.nodes) == ["w"]
    contents = read(saved(tmp_path, {"texts": ["x" * 4000 + str(n) for n in range(3000)]}))
    assert sum(map(len, contents.metadata.values())) < 5 * 2**20


def test_damaged_legacy_files_are_refused(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, {"w": torch.arange(6.0), "v": torch.arange(3)}, new=False).name)
    raw = path.read_bytes()
    for length in range(1, len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError, match=r"model\.pt: "):
            read(LocalFile(path))
    flag = raw.index(b"little_endian") + len(b"little_endian") + 2  # after the opcode that remembers the word
    assert raw[flag : flag + 1] == b"\x88"
    path.write_bytes(raw[:flag] + b"\x89" + raw[flag + 1 :])
    with pytest.raises(FormatError, match="big-endian"):
        read(LocalFile(path))
    path.write_bytes(raw.replace(struct.pack("<Q", 6), struct.pack("<Q", 2**60)))
    with pytest.raises(FormatError, match="truncated: the storage"):
        read(LocalFile(path))
    path.write_bytes(raw.replace(b"M\xe9\x03", b"M\xe8\x03", 1))
    with pytest.raises(FormatError, match="version of PyTorch's legacy format"):
        read(LocalFile(path))


def legacy(tmp_path: Path, content: bytes, keys: list[str], storages: bytes) -> LocalFile:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    raw = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    path = tmp_path / "legacy.pt"
    path.write_bytes(raw + b"\x80\x02" + content + b"." + pickle.dumps(keys, protocol=2) + storages)
    return LocalFile(path)


def test_views_of_legacy_storages(tmp_path: Path) -> None:
    six = struct.pack("<Q6f", 6, *range(6))

    def content(start: int, length: int) -> bytes:
        return view(0, [2], [1]).replace(
            b"K\x06tQ", b"K\x06(X\x01\x00\x00\x00v" + number(start) + number(length) + b"ttQ"
        )

    check(read(legacy(tmp_path, content(3, 2), ["0"], six)), {"w": torch.tensor([3.0, 4.0])})
    with pytest.raises(FormatError, match="view reaches beyond the storage '0'"):
        read(legacy(tmp_path, content(5, 2), ["0"], six))
    with pytest.raises(FormatError, match="reach beyond the storage"):
        read(legacy(tmp_path, content(3, 1), ["0"], six))
    with pytest.raises(FormatError, match="a view of a storage is none"):
        read(legacy(tmp_path, content(-1, 1), ["0"], six))
    plain = view(0, [2], [1]).replace(b"K\x06tQ", b"K\x06NtQ")
    with pytest.raises(FormatError, match="or one twice"):
        read(legacy(tmp_path, plain, ["0", "0"], six + six))
    with pytest.raises(FormatError, match="no tensor uses"):
        read(legacy(tmp_path, plain, ["1"], six))
    with pytest.raises(FormatError, match="tensor 'w': truncated: the storage '0' is not in the file"):
        read(legacy(tmp_path, plain, [], b""))


def valid_files(folder: Path) -> list[bytes]:
    shared = torch.arange(6.0).reshape(2, 3)
    tree = {
        "a": shared,
        "b": shared.t(),
        "c": nn.Linear(1, 1),
        "d": sample((3,), torch.float8_e5m2),
        "e": np.arange(3),
        "f": argparse.Namespace(x=[1, "two", 3.0]),
    }
    return [
        Path(saved(folder, tree, new, pickle_protocol=p).name).read_bytes() for new in (True, False) for p in (2, 5)
    ]


def mutated(raw: bytes, chance: random.Random) -> bytes:
    content = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at : at + chance.choice((1, 2, 4, 40))]
        elif kind == 2:
            content[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8)))
        elif kind == 3:
            content[at : at + 8] = chance.choice(
                (b"\xff" * 8, bytes(8), struct.pack("<Q", 2**31), struct.pack("<Q", len(raw)))
            )
        else:
            content[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(content)


def survives(path: Path, content: bytes, reader: Callable[[LocalFile], Contents]) -> None:
    """Either a refusal that names the file, or tensors that can be read, or refuse when they are."""
    path.write_bytes(content)
    try:
        nodes = reader(LocalFile(path)).nodes
        sizes = [materialize(node).nbytes for node in nodes.values() if node.spec.numel < 10_000]
        refusal = None
    except Error as error:
        sizes, refusal = [], str(error)
    assert all(size >= 0 for size in sizes)
    assert refusal is None or refusal.startswith(str(path))


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return valid_files(tmp_path_factory.mktemp("valid"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused(tmp_path: Path, valid: list[bytes], which: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(5):
        survives(tmp_path / "mutated.pt", mutated(valid[which], chance), read)


# Writing


def written(folder: Path, tensors: Mapping[str, Tensor], ties: Mapping[str, str], metadata: Mapping[str, str]) -> Path:
    """What the engine does with a layout."""
    specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items() if name not in ties}
    made = layout(specs, ties, metadata, "out.pt", list(tensors))
    path = folder / made.files[0].name
    with open(path, "wb") as file:
        file.truncate(made.files[0].size)
        for offset, raw in made.files[0].fixed:
            file.seek(offset)
            file.write(raw)
        for name in reversed(specs):
            file.seek(made.places[name][1])
            file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    assert made.finish is not None
    made.finish(folder)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    tensors = {str(dtype): sample((3, 4), dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "long": torch.arange(10_000)}
    tensors = {"tied": tensors["long"], **tensors}
    path = written(tmp_path, tensors, {"tied": "long"}, {"made by": "a test"})
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor), name
        assert loaded[name].is_contiguous()
    assert loaded["tied"].data_ptr() == loaded["long"].data_ptr()


def test_what_we_write_is_a_good_archive_and_comes_back(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.arange(6).reshape(2, 3), "c": torch.ones(2)}
    path = written(tmp_path, tensors, {"c": "b"}, {"lineage": '{"ü": 1}'})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    contents = read(LocalFile(path))
    check(contents, tensors)
    assert contents.nodes["b"] is contents.nodes["c"]
    assert contents.metadata == {"lineage": '{"ü": 1}'}
    assert all(node.offset % 64 == 0 for node in contents.nodes.values() if isinstance(node, Stored))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = written(tmp_path, {"a": torch.ones(2)}, {}, {}).read_bytes()
    assert written(tmp_path, {"a": torch.ones(2)}, {}, {}).read_bytes() == first


def test_orders_and_ties_that_cannot_be_are_refused() -> None:
    specs = {"a": Spec((1,), torch.float32)}
    with pytest.raises(Error, match="must name each of 1 tensors and 1 aliases once"):
        layout(specs, {"b": "a"}, {}, "x.pt", ["a"])
    with pytest.raises(Error, match=r"tied to the unknown tensor aa \(did you mean 'a'\?\)"):
        layout(specs, {"b": "aa"}, {}, "x.pt", ["a", "b"])
