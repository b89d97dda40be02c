"""Folders as people have them: shards, indices, caches made of links, and folders that are not what they say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from weightsmith.errors import Error, FormatError
from weightsmith.weights import Weights, open
from weightsmith.weights._open import input_files


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(10, 10, generator=generator) for i in range(5)}


@pytest.fixture
def sharded(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    Weights.of(tensors).save(tmp_path / "model", max_shard_size=900)
    return tmp_path / "model"


def index_of(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def set_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def equal(weights: Weights, tensors: dict[str, torch.Tensor]) -> None:
    assert list(weights) == list(tensors)
    for name in tensors:
        assert torch.equal(weights[name], tensors[name])


def test_shards_with_an_index(sharded: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert len(list(sharded.glob("model-*-of-00003.safetensors"))) == 3
    index = index_of(sharded)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == 5 * 400
    equal(open(sharded), tensors)
    equal(open(sharded / "model.safetensors.index.json"), tensors)
    assert len(input_files(open(sharded))) == 3
    for shard in set(index["weight_map"].values()):
        for name, tensor in safetensors.torch.load_file(sharded / shard).items():
            assert torch.equal(tensor, tensors[name])
            assert index["weight_map"][name] == shard


def test_a_tied_tensor_of_a_sharded_model(tmp_path: Path) -> None:
    one, two = torch.randn(8, 8), torch.randn(8, 8)
    Weights.of({"a": one, "b": two, "c": one}).save(tmp_path / "m", max_shard_size=300)
    read = open(tmp_path / "m")
    assert read.ties == {"c": "a"}
    assert torch.equal(read["c"], one)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00003.safetensors is missing.*layers.2"):
        open(sharded)


def test_index_promises_what_no_shard_has(sharded: Path) -> None:
    weight_map = index_of(sharded)["weight_map"]
    set_index(sharded, weight_map | {"ghost": "model-00001-of-00003.safetensors"})
    with pytest.raises(FormatError, match=r"model-00001-of-00003.safetensors: .*promises ghost"):
        open(sharded)
    moved = dict(weight_map) | {"layers.4.weight": "model-00001-of-00003.safetensors"}
    set_index(sharded, moved)
    with pytest.raises(FormatError, match=r"promises layers.4.weight"):
        open(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "a/../../model.safetensors",
        "/etc/hostname",
        "..\\m.safetensors",
        "C:m.safetensors",
        "",
        "a\0b",
    ],
)
def test_index_never_climbs_out(shard: str, sharded: Path) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "model.safetensors")
    set_index(sharded, {"layers.0.weight": shard})
    with pytest.raises(FormatError, match="outside its folder"):
        open(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "null",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"metadata": {}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_bad_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"index.json"):
        open(sharded)


def test_one_tensor_in_two_shards(sharded: Path, tensors: dict[str, torch.Tensor]) -> None:
    first = safetensors.torch.load_file(sharded / "model-00001-of-00003.safetensors")
    extra = {**first, "layers.4.weight": tensors["layers.4.weight"]}
    safetensors.torch.save_file(extra, sharded / "model-00001-of-00003.safetensors")
    with pytest.raises(
        FormatError, match=r"'layers.4.weight' is in both model-00001-of-00003.* and model-00003-of-00003"
    ):
        open(sharded)


def test_numbered_shards_without_an_index(sharded: Path, tensors: dict[str, torch.Tensor]) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    equal(open(sharded), tensors)
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match="shard 3 of 3 of model is missing"):
        open(sharded)
    (sharded / "model-00002-of-00003.safetensors").rename(sharded / "model-00002-of-00004.safetensors")
    with pytest.raises(Error, match="several checkpoints"):
        open(sharded)


def test_unrelated_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        Weights.of({name: torch.ones(1)}).save(tmp_path / f"{name}.safetensors")
    with pytest.raises(Error, match=r"several checkpoints \(x.safetensors, y.safetensors\)"):
        open(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    assert list(open(tmp_path)) == ["x"]
    Weights.of({"usual": torch.ones(1)}).save(tmp_path / "model.safetensors")
    assert list(open(tmp_path)) == ["usual"], "the usual name counts, whatever lies beside it"


def test_several_formats(tmp_path: Path) -> None:
    Weights.of({"s": torch.ones(1)}).save(tmp_path / "model.safetensors")
    torch.save({"p": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    with pytest.raises(FormatError, match=r"several formats.*safetensors, pt.*format='safetensors'"):
        open(tmp_path)
    assert list(open(tmp_path, format="safetensors")) == ["s"]
    assert list(open(tmp_path, format="pt")) == ["p"]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "vocabulary.bin")
    torch.save({"q": torch.ones(1)}, tmp_path / "other.pt")
    assert list(open(tmp_path, format="safetensors")) == ["s"], "what the others are is not asked"
    with pytest.raises(Error, match="no gguf weights; it has pt, safetensors"):
        open(tmp_path, format="gguf")
    with pytest.raises(Error, match=r"unknown format 'safetensor' .*did you mean 'safetensors'"):
        open(tmp_path, format="safetensor")
    with pytest.raises(FormatError, match="is safetensors, not pt"):
        open(tmp_path / "model.safetensors", format="pt")


def test_an_adapter_folder(tmp_path: Path) -> None:
    safetensors.torch.save_file({"base.q.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    adapter = open(tmp_path)
    assert adapter.spec("base.q.lora_A.weight").shape == (2, 3)
    assert list(adapter.files) == ["adapter_config.json"]


def test_a_cache_made_of_links(tmp_path: Path, sharded: Path, tensors: dict[str, torch.Tensor]) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{number:x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:x}")
    (blobs / "config").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/config")
    weights = open(snapshot)
    equal(weights, tensors)
    weights.save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_companions_travel_byte_for_byte(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    source = tmp_path / "in"
    Weights.of(tensors).save(source)
    beside = {
        "config.json": b'{"a": 1e-05,\r\n "torch_dtype": "float32" }', "tokenizer.json": os.urandom(3_000_000),
        "LICENSE": b"", "README.md": "é".encode(), "sub/deep/chat.jinja": b"{{x}}", "odd: name\\x.txt": b"?",
    }  # fmt: skip
    left = {
        "sub/other.safetensors": b"?", "optimizer.pt": b"?", ".hidden": b"?", "tf_model.h5": b"?",
        "checkpoint-5/a.txt": b"",
    }  # fmt: skip
    for name, content in {**beside, **left}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    weights = open(source)
    assert set(weights.files) == set(beside)
    saved = (2 * weights).save(tmp_path / "out")
    assert set(saved.files) == {"model.safetensors", *beside}
    for name, content in beside.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()} == set(
        saved.files
    )
    weights.save(tmp_path / "alone.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", "alone.safetensors"}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_follows_a_cast(key: str, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    raw = json.dumps({key: "float32", "eps": 1e-05, "name": "é"})
    weights = Weights.of({**tensors, "count": torch.tensor(3)}).with_files({"config.json": raw.encode()})
    weights.cast("bf16").save(tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text()) == {key: "bfloat16", "eps": 1e-05, "name": "é"}
    weights.cast({"*.0.*": "bf16", "*": "fp16"}).save(tmp_path / "mixed")
    assert (tmp_path / "mixed" / "config.json").read_text() == raw, "several dtypes: nothing better is known"
    for odd in (b"[]", b"{", b'{"torch_dtype": null}', b"[" * 99_999):
        weights.cast("bf16").with_files({"config.json": odd}).save(tmp_path / "odd", overwrite=True)
        assert (tmp_path / "odd" / "config.json").read_bytes() == odd


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped.txt", "model.safetensors", "a/../../b"])
def test_companions_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match="a file beside the tensors"):
        Weights.of({"a": torch.ones(1)}).with_files({name: b"x"}).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(Error, match=r"modle: no such file or folder \(did you mean 'model'\?\)"):
        open(tmp_path / "modle")
    with pytest.raises(Error, match="no weights in this folder"):
        open(tmp_path / "model")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(FormatError, match="0 bytes are too few"):
        open(tmp_path / "empty.safetensors")
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(FormatError, match=r"text.safetensors"):
        open(tmp_path / "text.safetensors")
    (tmp_path / "notes.xyz").write_text("hello")
    with pytest.raises(FormatError, match="neither safetensors, PyTorch, GGUF nor npz"):
        open(tmp_path / "notes.xyz")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(Error, match="not a regular file"):
        open(tmp_path / "pipe.safetensors")
    with pytest.raises(Error, match="cannot open a int"):
        open(7)  # type: ignore[arg-type]


def test_what_a_file_is_does_not_depend_on_its_name(tmp_path: Path) -> None:
    Weights.of({"a": torch.ones(2)}).save(tmp_path / "a.safetensors")
    for name in ("a.bin", "a.gguf", "a", "a.npz"):
        shutil.copy(tmp_path / "a.safetensors", tmp_path / name)
        assert open(tmp_path / name)["a"].tolist() == [1, 1]
    with pytest.raises(Error, match="only PyTorch files are nested"):
        open(tmp_path / "a.safetensors", at="state_dict")


def test_modules_mappings_and_arrays() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weights = open(module)
    assert list(weights) == list(module.state_dict())
    assert weights["0.weight"].data_ptr() == module[0].weight.data_ptr(), "referred to, not copied"
    assert not weights["0.weight"].requires_grad
    read_only = np.arange(6.0).reshape(2, 3)
    read_only.flags.writeable = False
    arrays = {
        "plain": np.arange(6, dtype=np.int16), "turned": np.arange(6.0).reshape(2, 3).T, "back": np.arange(4.0)[::-1],
        "big": np.arange(3, dtype=">f4"), "locked": read_only, "number": np.float64(2.5), "none": np.zeros((0, 2)),
    }  # fmt: skip
    read = open(arrays)
    for name, array in arrays.items():
        assert read[name].numpy().tolist() == array.tolist()
        assert read.spec(name).shape == array.shape
    with pytest.raises(Error, match="'words' is an array of <U1"):
        open({"words": np.array(["a"])})
    with pytest.raises(Error, match="'inner' is a dict, not a tensor"):
        open({"inner": {"a": torch.ones(1)}})
    with pytest.raises(Error, match="names must be words, got 3"):
        open({3: torch.ones(1)})  # type: ignore[dict-item]
    with pytest.raises(Error, match="'s' is a tensor of layout sparse_coo"):
        open({"s": torch.eye(2).to_sparse()})
    assert open(read) is read


def test_dtype_and_device_on_opening(sharded: Path) -> None:
    weights = open(sharded, dtype="bf16", device="cpu")
    assert {spec.dtype for spec in weights.specs.values()} == {torch.bfloat16}
    with pytest.raises(Error, match=r"unknown dtype 'bfloat61'.*did you mean 'bfloat16'"):
        open(sharded, dtype="bfloat61")
