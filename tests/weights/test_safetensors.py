"""safetensors: what others write is read, what we write others read, and a lie in a header is told plainly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.errors import Error, FormatError
from weightsmith.weights import Weights, open
from weightsmith.weights._spec import NAMES

CORPUS = Path(__file__).parent.parent / "fuzz_corpus" / "safetensors"

# The dtypes that the peer's torch front end can write; the others are written with its raw serializer.
PEER_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every kind of value, by random bits (booleans: 0 and 1)."""
    count = int(np.prod(shape, dtype=np.int64))
    generator = torch.Generator().manual_seed(count + len(str(dtype)))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def raw_file(path: Path, header: object, values: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)
    return path


def entry(dtype: str = "F32", shape: list[int] | None = None, first: int = 0, last: int = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": [first, last]}


# Parity


@pytest.mark.parametrize("dtype", PEER_DTYPES, ids=str)
def test_every_dtype_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": sample(dtype, 3, 5),
        "number": sample(dtype),
        "empty": sample(dtype, 0, 4),
        "odd": sample(dtype, 7),
        "strided": sample(dtype, 5, 3).t(),
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, theirs, {"who": "peer"})
    read = open(theirs)
    assert read.metadata == {"who": "peer"}
    assert set(read) == set(tensors)
    Weights.of(tensors).save(ours)
    back = safetensors.torch.load_file(ours)
    for name, tensor in tensors.items():
        assert read.spec(name).dtype == dtype == back[name].dtype
        assert read[name].shape == tensor.shape == back[name].shape
        assert bits(read[name]) == bits(tensor) == bits(back[name])
    resaved = tmp_path / "resaved.safetensors"
    read.save(resaved)
    assert {n: bits(t) for n, t in safetensors.torch.load_file(resaved).items()} == {
        n: bits(t) for n, t in tensors.items()
    }


def test_our_table_has_every_dtype_of_the_peer() -> None:
    assert set(PEER_DTYPES) <= set(NAMES)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no float4")
def test_float4_halves_the_last_axis(tmp_path: Path) -> None:
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    path = raw_file(tmp_path / "a.safetensors", {"w": entry("F4", [3, 8], 0, 12)}, bits(codes))
    weights = open(path)
    assert weights.spec("w").shape == (3, 4)
    assert bits(weights["w"]) == bits(codes)
    weights.save(tmp_path / "b.safetensors")
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.get_slice("w").get_shape() == [3, 8]
        assert file.get_slice("w").get_dtype() == "F4"
    with pytest.raises(FormatError, match=r"tensor 'w'.*even"):
        open(raw_file(tmp_path / "odd.safetensors", {"w": entry("F4", [2, 3], 0, 3)}, bytes(3)))
    with pytest.raises(Error, match="tensor w: float4 packs"):
        weights.cast("bf16")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Embedding(5, 3)
        self.outside = nn.Linear(3, 5, bias=False)
        self.outside.weight = self.inside.weight
        self.norm = nn.BatchNorm1d(3)


def test_ties_as_the_peer_writes_them_and_reads_them(tmp_path: Path) -> None:
    model = Tied()
    safetensors.torch.save_model(model, str(tmp_path / "theirs.safetensors"))
    read = open(tmp_path / "theirs.safetensors")
    assert set(read) == set(model.state_dict())
    assert len(read.ties) == 1
    assert read.node("inside.weight") is read.node("outside.weight")
    assert (read.nbytes, read.numel) == (open(model).nbytes, open(model).numel)
    open(model).save(tmp_path / "ours.safetensors")
    fresh = Tied()
    missing, unexpected = safetensors.torch.load_model(fresh, str(tmp_path / "ours.safetensors"))
    assert not missing
    assert not unexpected
    assert torch.equal(fresh.outside.weight, model.inside.weight)
    assert open(tmp_path / "ours.safetensors").ties == {"outside.weight": "inside.weight"}


def test_a_word_of_the_metadata_is_not_a_tie_because_a_tensor_is_called_so(tmp_path: Path) -> None:
    safetensors.torch.save_file({"pt": torch.ones(1)}, tmp_path / "a.safetensors", {"format": "pt"})
    weights = open(tmp_path / "a.safetensors")
    assert list(weights) == ["pt"]
    assert weights.metadata == {"format": "pt"}


def test_slices_of_the_peer_and_alignment(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(7), "c": torch.arange(5, dtype=torch.float64),
        "d": torch.ones(3, dtype=torch.bfloat16), "é ": torch.zeros(1),
    }  # fmt: skip
    Weights.of(tensors).save(tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 4096 == 0
    header = json.loads(raw[8:start])
    assert list(header)[1:] == list(tensors), "the order of the names is kept"
    for name, tensor in tensors.items():
        assert (start + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_slice("b")[2:5], tensors["b"][2:5])
        assert file.metadata()["format"] == "pt"


def test_unaligned_values_of_others_are_read(tmp_path: Path) -> None:
    values = torch.randn(4)
    header = {"x": entry("U8", [1], 0, 1), "y": entry("F32", [4], 1, 17)}
    weights = open(raw_file(tmp_path / "a.safetensors", header, b"\7" + bits(values)))
    assert torch.equal(weights["y"], values)
    assert torch.equal((weights.select("y") + 0.0)["y"], values)


def test_reserved_name_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(Error, match="__metadata__"):
        Weights.of({"__metadata__": torch.ones(1)}).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"tensor a: .*complex128.*cast"):
        Weights.of({"a": torch.ones(1, dtype=torch.complex128)}).save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# Lies

BAD_HEADERS = {
    "overlap": ({"a": entry(), "b": entry(first=4, last=12)}, "'b' overlaps 'a'"),
    "hole": ({"a": entry(), "b": entry(first=12, last=20)}, "'b' leaves a hole after 'a'"),
    "hole at the start": ({"a": entry(first=4, last=12)}, "'a' leaves a hole"),
    "out of range": ({"a": entry(shape=[200], last=800)}, "'a' needs 800 bytes"),
    "too short": ({"a": entry()}, "12 bytes after the last tensor"),
    "size of shape": ({"a": entry(shape=[3])}, r"'a': F32\[3\] is 12 bytes, its data_offsets span 8"),
    "overflow": ({"a": entry(shape=[2**62, 2**62, 2**62])}, "'a'.*span 8"),
    "overflow to zero": ({"a": entry(shape=[2**32, 2**32], last=0)}, "'a'"),
    "more than a float can tell": ({"a": entry(shape=[2**62] * 40)}, "'a'.*far too many"),
    "too large for 63 bits": ({"a": entry(shape=[2**63, 0], last=0)}, "'a' has no valid shape"),
    "negative shape": ({"a": entry(shape=[-2])}, "'a' has no valid shape"),
    "two negatives": ({"a": entry(shape=[-2, -1])}, "'a' has no valid shape"),
    "negative offset": ({"a": entry(first=-8, last=0)}, "'a' has no valid data_offsets"),
    "backwards": ({"a": entry(first=8, last=0)}, "'a'.*span -8"),
    "float shape": ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "'a' has no valid shape"),
    "bool shape": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "'a' has no valid shape"),
    "word shape": ({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, "'a' has no valid shape"),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 8]}}, "'a' has no valid data_offsets"),
    "unknown dtype": ({"a": entry("F37")}, "'a' has the unknown dtype 'F37'"),
    "no dtype": ({"a": {"dtype": None, "shape": [2], "data_offsets": [0, 8]}}, "'a' has the unknown dtype"),
    "dtype list": ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "'a' has the unknown dtype"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, "'a' must have dtype, shape and data_offsets"),
    "extra key": ({"a": entry() | {"more": 1}}, "'a' must have"),
    "entry is a list": ({"a": [1, 2]}, "'a' must have"),
    "metadata number": ({"__metadata__": {"a": 1}}, "__metadata__ must map words to words"),
    "metadata list": ({"__metadata__": ["a"]}, "__metadata__ must map words to words"),
    "many axes": ({"a": entry(shape=[1] * 65, last=4)}, "'a' has no valid shape"),
    "six bits": ({"a": entry("F6_E2M3", [4], 0, 3)}, "'a' is F6_E2M3, which this version"),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, "'a'"),
    "duplicate name": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":[]}', "'a' stands twice"),
    "duplicate inside": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', "'dtype' stands twice"),
    "not a number": (b'{"a":NaN}', "NaN is not JSON"),
    "half a character": (b'{"\\ud800":{"dtype":"U8","shape":[20],"data_offsets":[0,20]}}', "no valid JSON"),
    "not text": (b'{"\xff\xfe":1}', "no valid JSON"),
    "a list": (b"[]", "not a safetensors file|neither"),
    "cut JSON": (b'{"a":{"dtype', "no valid JSON"),
    "a huge number": (b'{"a":' + b"9" * 5000 + b"}", "no valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no valid JSON"),
    "nothing": (b"", "not a safetensors file|neither"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_a_lie_is_named(kind: str, tmp_path: Path) -> None:
    header, message = BAD_HEADERS[kind]
    path = raw_file(tmp_path / "lie.safetensors", header, bytes(20))
    with pytest.raises(FormatError, match=message) as caught:
        open(path)
    assert "lie.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("depth", [50, 300, 480, 700, 900, 960, 1000, 3000])
@pytest.mark.parametrize("where", ["shape", "dtype", "metadata", "offsets"])
def test_depth_never_escapes_as_a_recursion_error(depth: int, where: str, tmp_path: Path) -> None:
    deep = b"[" * depth + b"]" * depth
    parts = {"shape": b"[]", "dtype": b'"U8"', "offsets": b"[0,1]", "metadata": b'""'} | {where: deep}
    text = b'{"__metadata__":{"m":%(metadata)b},"a":{"dtype":%(dtype)b,"shape":%(shape)b,"data_offsets":%(offsets)b}}'
    header = text % {key.encode(): value for key, value in parts.items()}
    with pytest.raises(FormatError):
        open(raw_file(tmp_path / "a.safetensors", header, b"\0"))


def test_a_long_name_makes_a_short_message(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        open(raw_file(tmp_path / "a.safetensors", {"x" * 1_000_000: entry("F37")}))
    assert len(str(caught.value)) < 1000


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(3), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"a.safetensors"):
            open(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="1 bytes after the last tensor"):
        open(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 1000])
def test_a_lying_header_length(length: int, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="header"):
        open(raw_file(tmp_path / "a.safetensors", {"a": entry()}, bytes(8), length))


def test_a_file_cut_after_it_was_opened_is_an_error_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Weights.of({"a": torch.randn(3000)}).save(path)
    weights = open(path)
    del_later = weights["a"]
    os.truncate(path, 5000)
    with pytest.raises(FormatError, match=r"tensor a: .*a.safetensors.*ends at byte 5000"):
        weights["a"]
    del del_later
    with pytest.raises(FormatError, match=r"tensor a: .*a.safetensors"):
        (weights + 1.0)["a"]
    with pytest.raises(FormatError, match=r"a.safetensors: ends at byte 5000"):
        weights.save(tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    os.truncate(path, 0)
    with pytest.raises(FormatError, match=r"a\.safetensors"):
        weights["a"]


def test_a_file_replaced_after_it_was_opened_is_the_old_file_still(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Weights.of({"a": torch.ones(3)}).save(path)
    weights = open(path)
    Weights.of({"zz": torch.zeros(1), "a": torch.zeros(3)}).save(path, overwrite=True)
    assert weights["a"].tolist() == [1, 1, 1]
    assert (weights + 0.0)["a"].tolist() == [1, 1, 1]


HOSTILE = """
import resource, sys
from weightsmith.weights import open
from weightsmith.errors import FormatError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open(path)
    except FormatError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(str(error)))
"""


def test_memory_for_a_bomb_is_bounded(tmp_path: Path) -> None:
    size, paths = 12_000_000, []
    for number, piece in enumerate((b"[],", b'{"":[]},', b"[[[]]],", b'"a",')):
        header = b'{"a":[' + piece * (size // len(piece)) + b"0]}"
        paths.append(raw_file(tmp_path / f"{number}.safetensors", header))
    run = subprocess.run([sys.executable, "-c", HOSTILE, *paths], capture_output=True, text=True, check=True)
    for line in run.stdout.splitlines():
        grown, message = map(int, line.split())
        assert grown * 1024 < 8 * size
        assert message < 1000
    assert len(run.stdout.splitlines()) == len(paths)


def test_brackets_in_words_are_no_bomb(tmp_path: Path) -> None:
    words = {"note": "[{:" * 500_000 + '\\"[]'}
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", words)
    assert open(tmp_path / "a.safetensors").metadata == words


def test_an_ordinary_dense_header_is_no_bomb(tmp_path: Path) -> None:
    count = 25_000
    header = b"{%b}" % b",".join(
        b'"%x":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(count)
    )
    assert len(header) > 1_000_000
    assert len(open(raw_file(tmp_path / "a.safetensors", header, bytes(count)))) == count


# Fuzzing: whatever stands there, a `FormatError` or weights whose every byte is in the file


def try_bytes(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        weights = open(path)
    except FormatError as error:
        assert path.name in str(error)  # noqa: PT017 - either outcome is right
        return
    assert weights.nbytes <= len(raw)
    for name in weights:
        assert weights[name].numel() == weights.spec(name).numel
    try:
        with safetensors.safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) <= set(weights)
    except (safetensors.SafetensorError, UnicodeEncodeError):
        assert raw[8:9] == b"{"  # it may know fewer dtypes than we do; it never reads another thing


VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=8,
)
COUNT = st.one_of(st.integers(0, 9), st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63, 2**64]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*NAMES.values(), "F6_E2M3", "X"]),
        "shape": st.lists(COUNT, max_size=4),
        "data_offsets": st.lists(COUNT, min_size=2, max_size=2),
    }
)
HEADER = st.dictionaries(
    st.one_of(st.text(max_size=4), st.just("__metadata__")), st.one_of(ENTRY, ENTRY, ENTRY, VALUE), max_size=5
)


@st.composite
def plausible(draw: st.DrawFn) -> bytes:
    """A file that fits together, with one or two things changed."""
    header: dict[str, object] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(list(NAMES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if NAMES[dtype] == "F4" and shape:
            shape[-1] *= 2
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    for _ in range(draw(st.integers(0, 2))):
        if header:
            name = draw(st.sampled_from(sorted(header)))
            mutated = dict(header[name]) if isinstance(header[name], dict) else {}
            mutated[draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(VALUE)
            header[name] = draw(st.sampled_from([mutated, draw(ENTRY)]))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    raw = bytearray(len(text).to_bytes(8, "little") + text + bytes(end))
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))] if draw(st.booleans()) else raw)


MANY = int(os.environ.get("WEIGHTSMITH_FUZZ", "300"))


@settings(max_examples=MANY, deadline=None)
@given(raw=plausible())
def test_fuzz_changed_files(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    try_bytes(tmp_path_factory.getbasetemp() / "changed.safetensors", raw)


@settings(max_examples=MANY, deadline=None)
@given(header=HEADER, values=st.binary(max_size=64))
def test_fuzz_headers(header: dict[str, object], values: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = json.dumps(header).encode()
    try_bytes(tmp_path_factory.getbasetemp() / "header.safetensors", len(text).to_bytes(8, "little") + text + values)


@settings(max_examples=MANY, deadline=None)
@given(text=st.binary(max_size=200), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)), brace=st.booleans())
def test_fuzz_bytes(text: bytes, length: int | None, brace: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = b"{" + text if brace else text
    length = len(text) if length is None else length
    try_bytes(tmp_path_factory.getbasetemp() / "bytes.safetensors", length.to_bytes(8, "little") + text)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.safetensors")), ids=lambda p: p.stem)
def test_what_fuzzing_found_stays_found(path: Path) -> None:
    with pytest.raises(FormatError):
        open(path)


def test_the_corpus_is_there() -> None:
    assert list(CORPUS.glob("*.safetensors"))
