"""``weightsmith convert``: every option arrives where it should."""

from __future__ import annotations

import json

import pytest
import torch

import weightsmith
from weightsmith.weights import Weights


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.pt", "out.npz"])
def test_formats(run, model, tmp_path, name):
    status, out, err = run("convert", model, "-o", tmp_path / name)
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path / name}: 4 tensors, ")
    assert run("diff", model, tmp_path / name)[0] == 0


def test_dtype_choice_and_shards(run, model, tmp_path):
    arguments = ["--dtype", "bf16", "-p", "h.*", "-p", "wte*", "--drop", "h.2.*", "--max-shard-size", "200"]
    status, out, _ = run(
        "convert", model, "-o", tmp_path / "out", *arguments, "--threads", "1", "--memory", "1MB", "--json"
    )
    saved = json.loads(out)
    assert status == 0
    assert saved["tensors"] == 3
    assert "model-00001-of-00003.safetensors" in saved["files"]
    made = weightsmith.open(tmp_path / "out")
    assert {str(spec) for spec in made.specs.values()} == {"bfloat16[10, 4]", "bfloat16[8, 8]"}
    assert list(made) == ["wte.weight", "h.0.fc.weight", "h.1.fc.weight"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_no_shards(run, model, tmp_path):
    assert run("convert", model, "-o", tmp_path / "out", "--max-shard-size", "none")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_format_in_a_folder(run, model, tmp_path):
    assert run("convert", model, "-o", tmp_path / "out", "--format", "pt")[0] == 0
    assert (tmp_path / "out" / "pytorch_model.bin").exists()


def test_a_part_of_a_pytorch_file(run, tmp_path):
    torch.save({"ema": {"w": torch.ones(2)}, "model": {"w": torch.zeros(2)}}, tmp_path / "run.pt")
    assert run("convert", tmp_path / "run.pt", "--at", "ema", "-o", tmp_path / "w.safetensors")[0] == 0
    assert weightsmith.open(tmp_path / "w.safetensors")["w"].tolist() == [1, 1]


def test_what_is_there_stays_unless_told(run, model, tuned, tmp_path):
    status, _, err = run("convert", model, "-o", tuned)
    assert status == 2
    assert "--overwrite" in err
    assert run("diff", model, tuned)[0] == 1
    assert run("convert", model, "-o", tuned, "--overwrite")[0] == 0
    assert run("diff", model, tuned)[0] == 0


def test_several_formats_in_one_folder(run, model, tmp_path):
    torch.save({"w": torch.ones(1)}, model / "pytorch_model.bin")
    status, _, err = run("convert", model, "-o", tmp_path / "out")
    assert status == 2
    assert "several formats" in err
    assert run("convert", model, "--input-format", "pt", "-o", tmp_path / "out")[0] == 0
    assert list(weightsmith.open(tmp_path / "out")) == ["w"]


def test_a_size_that_is_none(run, model, tmp_path):
    status, _, err = run("convert", model, "-o", tmp_path / "out", "--memory", "lots")
    assert status == 2
    assert "'lots' is no size" in err
    assert not (tmp_path / "out").exists()


def test_a_value_that_does_not_fit_is_an_error_that_names_the_tensor(run, tmp_path):
    Weights.of({"w": torch.tensor([1e6])}).save(tmp_path / "w.safetensors")
    status, _, err = run("convert", tmp_path / "w.safetensors", "-o", tmp_path / "o.safetensors", "--dtype", "fp16")
    assert status == 2
    assert "tensor w" in err
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("name", ["small", "small.safetensors", "small.pt", "small.npz"])
def test_encoded_and_back(run, tmp_path, name):
    values = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    weights = {"w": values.bfloat16().float(), "b": torch.zeros(3)}
    Weights.of(weights).with_files({"config.json": b'{"dtype": "float32"}'}).save(tmp_path / "model")
    status, _, err = run("convert", tmp_path / "model", "-o", tmp_path / name, "--encode", "exponents")
    assert (status, err) == (0, "")
    assert "w_stream" in weightsmith.open(tmp_path / name)
    assert not (tmp_path / "small" / "config.json").exists()
    assert run("convert", tmp_path / name, "-o", tmp_path / "back", "--decode", "-p", "w")[0] == 0
    back = weightsmith.open(tmp_path / "back")
    assert list(back) == ["w"]
    assert torch.equal(back["w"], weights["w"])
    if name == "small":
        assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"dtype": "float32"}


def test_a_cast_comes_before_encoding(run, tmp_path):
    weights = {"w": torch.randn(300, 100), "b": torch.zeros(3)}
    Weights.of(weights).with_files({"config.json": b'{"dtype": "float32"}'}).save(tmp_path / "model")
    options = ["--encode", "exponents", "--dtype", "bf16", "--threads", "1"]
    assert run("convert", tmp_path / "model", "-o", tmp_path / "small", *options)[0] == 0
    assert run("convert", tmp_path / "small", "-o", tmp_path / "back", "--decode")[0] == 0
    assert torch.equal(weightsmith.open(tmp_path / "back")["w"], weights["w"].bfloat16())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"dtype": "bfloat16"}


def test_encoding_that_cannot_be(run, model, tmp_path):
    arguments = ["convert", model, "-o", tmp_path / "out"]
    status, _, err = run(*arguments, "--encode", "exponents", "--decode")
    assert (status, "give one" in err) == (2, True)
    status, _, err = run(*arguments, "--decode")
    assert (status, "nothing here is encoded" in err) == (2, True)
    status, _, err = run(*arguments, "--encode", "exponents")  # tensors of a few values
    assert (status, "gets smaller" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    status, _, err = run("convert", model, "-o", model, "--encode", "exponents")
    assert (status, "--overwrite" in err) == (2, True)


def test_the_words_of_encode_are_those_of_share():
    from weightsmith.cli._convert import command
    from weightsmith.share.room import CODECS

    encode = next(one for one in command().params if one.name == "encode")
    assert tuple(encode.type.choices) == CODECS
