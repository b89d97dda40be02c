"""``weightsmith quantize``: with and without a text, to a size, told and drawn; wrong calls found at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weightsmith as ws

NAME = "model.layers.0.mlp.up_proj.weight"
SIZES = ("--samples", 4, "--length", 32)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_folder_that_transformers_loads(run, llama: Path, method: str):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install 'weightsmith[peers]'")
    from transformers import AutoModelForCausalLM

    near, far, out = llama.parent / "near.txt", llama.parent / "far.txt", llama.parent / "out"
    status, said, err = run(
        "quantize", method, llama, "--bits", 4, "--group", 8, "--calibrate", near, *SIZES, "--evaluate", far,
        "--format", "compressed-tensors", "-o", out, "--json",
    )  # fmt: skip
    assert status == 0, err
    told = json.loads(said)
    assert told["quantized"]["matrices"] == 21
    assert 4 < told["quantized"]["bits a weight"] < 9
    assert [row["model"] for row in told["evaluated"]] == ["before", "after"]
    assert told["evaluated"][1]["KL"] > 0
    assert told["calibration"]["fingerprint"]
    net = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    floats = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ws.quantize.dequantize(out).load_into(floats)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(net(tokens).logits, floats(tokens).logits, atol=1e-4, rtol=1e-4)


def test_on_a_text_is_what_python_makes(run, llama: Path):
    near, out = llama.parent / "near.txt", llama.parent / "out"
    status, _, err = run(
        "quantize", "gptq", llama, "--bits", "3.5", "--group", 8, "--no-symmetric", "--calibrate", near, *SIZES,
        "--clip", 4, "-o", out,
    )  # fmt: skip
    if status:  # a flag by tensor is a value, not a switch
        status, _, err = run(
            "quantize", "gptq", llama, "--bits", "3.5", "--group", 8, "--symmetric", "false", "--calibrate", near,
            *SIZES, "--clip", 4, "-o", out,
        )  # fmt: skip
    assert status == 0, err
    expected = ws.quantize.one_shot(
        llama, 3.5, calibrate=str(near), group=8, symmetric=False, clip=4, samples=4, length=32
    )
    found = ws.open(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("method", "words", "options"),
    [
        ("gptq", ("--guide", "loss"), {"guide": "loss"}),
        ("reconstruct", ("--steps", 2, "--train", "weights and steps"), {"steps": 2, "train": "weights and steps"}),
        ("rtn", ("--transform", "rotate"), {"transform": "rotate"}),
        ("gptq", ("--heal", 2), {"heal": 2}),
    ],
)
def test_ways_are_those_of_python(run, llama: Path, method: str, words: tuple[str, ...], options: dict[str, object]):
    near, out = llama.parent / "near.txt", llama.parent / "out"
    status, _, err = run(
        "quantize", method, llama, "--bits", 3, "--group", 8, "--calibrate", near, *SIZES, *words, "-o", out
    )
    assert status == 0, err
    expected = ws.quantize.one_shot(llama, 3, calibrate=str(near), method=method, group=8, samples=4, length=32,
                                    **options)  # fmt: skip
    found = ws.open(out)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_values_and_a_report(run, llama: Path):
    near, out, page = llama.parent / "near.txt", llama.parent / "out", llama.parent / "r.html"
    status, said, err = run(
        "quantize", "gptq", llama, "--bits", 3, "--group", 8, "--calibrate", near, *SIZES, "--evaluate", near,
        "--report", page, "--format", "values", "-o", out,
    )  # fmt: skip
    assert status == 0, err
    assert "bits a weight" in said
    assert "is calibrated on as well" in err
    assert ws.open(out).specs == ws.open(llama).specs
    assert "What quantizing has changed" in page.read_text(encoding="utf-8")


def test_to_a_size(run, llama: Path):
    near, out = llama.parent / "near.txt", llama.parent / "out"
    size = ws.open(llama).nbytes // 3
    status, said, err = run(
        "quantize", "auto", llama, "--target-size", size, "--group", 8, "--calibrate", near, *SIZES, "-o", out,
        "--recipe", "nearest", "--recipe", "gptq", "--json",
    )  # fmt: skip
    assert status == 0, err
    told = json.loads(said)
    assert set(told["chosen"]["KL"]) == {"nearest", "gptq"}
    assert told["quantized"]["bytes in all"] <= size
    assert "model.embed_tokens.weight" in ws.quantize.codes(out)


def test_the_frontier_is_drawn(run, llama: Path):
    near, far, page = llama.parent / "near.txt", llama.parent / "far.txt", llama.parent / "r.html"
    status, said, err = run(
        "quantize", "frontier", llama, "--calibrate", near, "--evaluate", far, "--bits", "2,4", "--recipe", "nearest",
        "--group", 8, *SIZES, "--report", page,
    )  # fmt: skip
    assert status == 0, err
    assert said.count("nearest") == 2
    assert page.exists()
    status, said, err = run(
        "quantize", "frontier", llama, "--calibrate", near, "--evaluate", far, "--bits", "2", "--recipe", "nearest",
        "--group", 8, *SIZES, "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(said)["rows"][0]["bits"] == 2


def test_formats_are_those_of_the_library_and_help_fits(run):
    from weightsmith.cli import _quantize

    assert set(_quantize.FORMATS) == {*_quantize.OURS, *ws.quantize.formats.FORMATS}
    usual = {method.name: _quantize.usual_grid(method) for method in _quantize.methods()}
    assert (usual["rtn"], usual["lnq"], usual["billm"]) == ("int", "levels", "billm")
    for name in (*usual, "auto", "frontier"):
        _, said, _ = run("quantize", name, "--help")
        assert max(map(len, said.splitlines())) <= 100, name
    _, said, _ = run("quantize", "billm", "--help")
    assert "[default: billm]" in " ".join(said.split())
    assert "--bits 4" not in said


def test_one_file_for_llama_cpp(run, tmp_path: Path):
    pytest.importorskip("gguf", reason="GGUF files are checked by the package gguf")
    words = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 6,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    shapes = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
    made = {f"model.layers.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    made |= {"model.embed_tokens.weight": torch.randn(6, 32), "model.norm.weight": torch.ones(32)}
    ws.weights.Weights.of(made).with_files({"config.json": json.dumps(words).encode()}).save(tmp_path / "m")
    call = ("quantize", "rtn", tmp_path / "m", "--group", 32, "--scale-dtype", "float16", "--format", "gguf")
    status, _, err = run(*call, "--bits", 5, "-o", tmp_path / "q.gguf")
    assert status == 0, err
    coded = ws.quantize.rtn(tmp_path / "m", bits=5, group=32, scale_dtype="float16")
    expected = ws.quantize.dequantize(coded, "float32")["model.layers.0.mlp.up_proj.weight"]
    found = ws.quantize.formats.unpack(tmp_path / "q.gguf")
    same = next(name for name in found if "up" in name)
    torch.testing.assert_close(found[same].float(), expected)
    status, _, err = run(*call, "--bits", 3, "--requantize", "Q8_0", "-o", tmp_path / "r")
    assert status == 0, err
    assert (tmp_path / "r" / "model.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gptq", "M", "-o", "O"], "gptq asks the data: add --calibrate TEXT"),
        (["rtn", "M", "--bits", "3.5", "-o", "O"], "--bits 3.5 is shared among the tensors by what data say"),
        (["rtn", "M", "--store", "S", "-o", "O"], "--store asks the data"),
        (["rtn", "M", "--dtype", "bfloat16", "-o", "O"], "say --scale-dtype, or --format values"),
        (["rtn", "M", "--requantize", "Q8_0", "-o", "O"], "--requantize is for --format gguf"),
        (  # found before the text, which is too short, is asked
            ["gptq", "M", "--bits", "3", "--group", "8", "--calibrate", "T", "--format", "awq", "-o", "O"],
            "codes are of 4 bits, not 3",
        ),
        (
            ["gptq", "M", "--calibrate", "T", "--samples", "4", "--length", "32", "--group", "7", "-o", "O"],
            "groups of 7 do not fill",
        ),
        (["gptq", "M", "--calibrate", "missing.txt", "-o", "O"], "missing.txt"),
        (["auto", "M", "--calibrate", "T", "-o", "O"], "give --target-size, or --bits"),
        (
            ["auto", "M", "--calibrate", "T", "--samples", "4", "--length", "32", "--target-size", "10", "-o", "O"],
            "10 bytes cannot be had",
        ),
        (
            ["auto", "M", "--calibrate", "T", "--samples", "4", "--length", "32", "--target-size", "huge", "-o", "O"],
            "'huge' is no size",
        ),
        (["frontier", "M", "--calibrate", "T", "--evaluate", "T", "--bits", "x"], "is no list of numbers"),
        (["gptc", "M"], "no method 'gptc' in quantize (did you mean 'gptq'?)"),
    ],
)
def test_wrong_calls_are_told_before_anything_is_written(run, shared_llama: Path, tmp_path: Path, arguments, message):
    places = {"M": shared_llama, "T": shared_llama.parent / "near.txt", "O": tmp_path / "out", "S": tmp_path / "store"}
    status, _, err = run("quantize", *(places.get(word, word) for word in arguments))
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()
