"""A checkpoint in one go, against its parts called one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith import calibration, quantize
from weightsmith.errors import Error
from weightsmith.quantize import dequantize, one_shot, rtn, sequential, with_embeddings
from weightsmith.quantize._judged import Judge
from weightsmith.quantize.budget import curves, mixed

SIZES: dict[str, Any] = {"samples": 4, "length": 32}


def same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.metadata == other.metadata


def test_one_shot_is_its_parts(llama: Path):
    near = llama.parent / "near.txt"
    batches = list(calibration.texts(llama, [near], **SIZES))
    found = one_shot(llama, 3, calibrate=str(near), group=8, symmetric=False, damp=0.05, **SIZES)
    same(found, sequential(llama, batches, "gptq", bits=3, group=8, symmetric=False, damp=0.05))
    same(one_shot(llama, 3, calibrate=batches, method="rtn", group=8), rtn(llama, bits=3, group=8))


def test_a_mean_of_bits_is_shared_by_what_data_say(llama: Path):
    batches = list(calibration.texts(llama, [llama.parent / "near.txt"], **SIZES))
    found = one_shot(llama, 3.5, calibrate=batches, group=8)
    felt = curves(llama, batches, group=8)
    widths = mixed(felt, 3.5)
    assert len(set(widths.values())) > 1
    same(found, sequential(llama, batches, "gptq", bits=widths, group=8, pattern=list(widths)))
    coded = quantize.codes(found)
    weights = {name: torch.Size(code.shape).numel() for name, code in coded.items()}
    mean = sum(code.grid.bits * weights[name] for name, code in coded.items()) / sum(weights.values())
    assert 3.0 < mean <= 3.5


def test_a_transform_comes_first(llama: Path):
    batches = list(calibration.texts(llama, [llama.parent / "near.txt"], **SIZES))
    found = one_shot(llama, 3, calibrate=batches, method="rtn", group=8, transform="awq")
    changed = quantize.transforms.awq(llama, batches, bits=3, group=8)
    back, expected = dequantize(found), dequantize(rtn(changed, bits=3, group=8))
    for name in expected:
        torch.testing.assert_close(back[name], expected[name])
    assert not torch.equal(
        back["model.layers.0.input_layernorm.weight"], ws.open(llama)["model.layers.0.input_layernorm.weight"]
    )


def test_embeddings_are_coded_once_under_every_name(llama: Path, tmp_path: Path):
    coded = with_embeddings(rtn(llama, bits=4, group=8), 8, {"group": 8})
    coded.save(tmp_path / "q")
    found = quantize.codes(tmp_path / "q")
    assert found["model.embed_tokens.weight"].grid.bits == 8
    assert found["model.layers.0.mlp.up_proj.weight"].grid.bits == 4
    back, whole = dequantize(tmp_path / "q"), ws.open(llama)
    name = "model.embed_tokens.weight"
    expected = rtn(whole[name], bits=8, group=8, symmetric=False, clip=8)
    torch.testing.assert_close(back[name], expected.values())
    assert not (tmp_path / "q" / "config.json").exists()  # no other program takes coded embeddings for what it knows
    back.save(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    judge = Judge(whole, list(calibration.texts(llama, [llama.parent / "far.txt"], **SIZES)))
    assert judge(whole) == pytest.approx(0, abs=1e-4)
    assert 0 < judge(back) < judge(dequantize(rtn(llama, bits=2)))


def test_the_judge_is_what_the_report_of_language_models_says(llama: Path):
    batches = list(calibration.texts(llama, [llama.parent / "far.txt"], samples=4, length=32))
    after = dequantize(rtn(llama, bits=3))
    judge = Judge(ws.open(llama), batches)
    model = pytest.importorskip("transformers", reason="loads a Hugging Face model").AutoModelForCausalLM
    dense = model.from_pretrained(llama)
    own = model.from_pretrained(llama)
    after.load_into(own)
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        known, found = (one(tokens).logits.log_softmax(-1) for one in (dense, own))
    expected = (known.exp() * (known - found)).sum(-1).mean()
    assert judge(after) == pytest.approx(float(expected), rel=2e-2)


def test_the_judge_leaves_padding_out_and_bears_words_that_are_ruled_out(llama: Path):
    whole, other = ws.open(llama), dequantize(rtn(llama, bits=3))
    tokens = torch.arange(12)[None]
    padded = {"input_ids": torch.cat([tokens, torch.zeros_like(tokens)], 1)}
    padded["attention_mask"] = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], 1)
    plain = Judge(whole, [{"input_ids": tokens}])
    assert Judge(whole, [padded])(other) == pytest.approx(plain(other), rel=1e-3)
    assert 0 <= plain(whole) < 1e-5

    def without_one(module: Any, given: Any, found: Any) -> Any:
        found.logits = found.logits.index_fill(-1, torch.tensor([3]), -torch.inf)
        return found

    plain.model.register_forward_hook(without_one)
    ruled = plain._answers({"input_ids": tokens})
    assert ruled.isfinite().all()
    plain.whole = [ruled.to(torch.float16)]
    assert 0 < plain(other) < 100
    with pytest.raises(Error, match="not padding"):
        Judge(whole, [{**padded, "attention_mask": torch.zeros_like(padded["attention_mask"])}])


@pytest.mark.parametrize(("method", "word"), [("bitmod", "MixedTypes"), ("two_four", "TwoFour"), ("billm", "Residual")])
def test_a_method_rounds_on_its_own_grid_with_what_the_data_say(shared_llama: Path, method: str, word: str):
    batches = list(calibration.texts(shared_llama, [shared_llama.parent / "near.txt"], **SIZES))
    found = one_shot(shared_llama, calibrate=batches, method=method, group=8)
    assert {type(code.grid).__name__ for code in quantize.codes(found).values()} == {word}
    name = "model.layers.0.mlp.up_proj.weight"
    model = pytest.importorskip("transformers", reason="loads a Hugging Face model").AutoModelForCausalLM
    gram = ws.stats.gram(model.from_pretrained(shared_llama), batches, pattern=name)
    first = dequantize(one_shot(shared_llama, calibrate=batches, method=method, group=8, propagate="dense"))[name]
    expected = dequantize(quantize.METHODS[method](shared_llama, stats=gram, group=8, pattern=name))[name]
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-3)


def test_steps_are_stored_as_asked_and_a_mean_is_of_widths_that_the_grid_has(shared_llama: Path):
    near = str(shared_llama.parent / "near.txt")
    found = one_shot(
        shared_llama, 3.5, calibrate=near, method="bitmod", group=8, embeddings=8, scale_dtype="float16", **SIZES
    )
    coded = quantize.codes(found)
    assert {code.grid.bits for name, code in coded.items() if "embed" not in name} == {3, 4}
    assert found.spec("model.embed_tokens.weight_scale").dtype == torch.float16


def test_a_transform_that_runs_the_whole_model_gets_it(shared_llama: Path):
    batches = list(calibration.texts(shared_llama, [shared_llama.parent / "near.txt"], **SIZES))
    found = one_shot(shared_llama, 3, calibrate=batches, method="rtn", group=8, transform="smoothquant_plus")
    model = pytest.importorskip("transformers", reason="loads a Hugging Face model").AutoModelForCausalLM
    changed = quantize.transforms.smoothquant_plus(
        shared_llama, batches, model=model.from_pretrained(shared_llama), bits=3, group=8
    )
    back, expected = dequantize(found), dequantize(rtn(changed, bits=3, group=8))
    for name in expected:
        torch.testing.assert_close(back[name], expected[name])


def test_guided_and_learned_are_their_parts(shared_llama: Path):
    batches = list(calibration.texts(shared_llama, [shared_llama.parent / "near.txt"], **SIZES))
    found = one_shot(shared_llama, 3, calibrate=batches, group=8, guide="attention")
    same(found, quantize.rsq(shared_llama, batches, "gptq", bits=3, group=8))
    plain = one_shot(shared_llama, 3, calibrate=batches, group=8)
    assert any(not torch.equal(found[name], plain[name]) for name in plain)

    model = pytest.importorskip("transformers", reason="loads a Hugging Face model").AutoModelForCausalLM
    found = one_shot(shared_llama, 3, calibrate=batches, group=8, guide="loss")
    alone = quantize.guidedquant(model.from_pretrained(shared_llama), batches, "gptq", bits=3, group=8)
    assert set(found.files) == set(ws.open(shared_llama).files)
    coded = [name for name in found if name.endswith(("_packed", "_scale"))]
    assert len(coded) == 42
    assert all(torch.equal(found[name], alone[name]) for name in coded)

    found = one_shot(shared_llama, 3, calibrate=batches, method="reconstruct", group=8, steps=3, propagate="dense")
    same(found, quantize.reconstruct(shared_llama, batches, bits=3, group=8, steps=3, propagate="dense"))
    other = one_shot(shared_llama, 3, calibrate=batches, method="reconstruct", group=8, steps=3, dtype="bfloat16")
    same(other, quantize.reconstruct(shared_llama, batches, bits=3, group=8, steps=3, compute="bfloat16"))


def test_healed_is_end_to_end_with_itself_as_the_teacher(shared_llama: Path):
    model = pytest.importorskip("transformers", reason="loads a Hugging Face model").AutoModelForCausalLM
    batches = list(calibration.texts(shared_llama, [shared_llama.parent / "near.txt"], **SIZES))
    plain = one_shot(shared_llama, 2, calibrate=batches, group=8)
    healed = one_shot(shared_llama, 2, calibrate=batches, group=8, heal=20)
    taught = model.from_pretrained(shared_llama)
    same(healed, quantize.end_to_end(plain, batches, taught, teacher=True, steps=20, lr=3e-3))
    packed = [name for name in plain if name.endswith("_packed")]
    assert packed
    assert all(torch.equal(plain[name], healed[name]) for name in packed)
    judge = Judge(ws.open(shared_llama), batches)
    assert judge(dequantize(healed)) < judge(dequantize(plain))


def test_a_rotation_comes_first(shared_llama: Path):
    batches = list(calibration.texts(shared_llama, [shared_llama.parent / "near.txt"], **SIZES))
    found = one_shot(shared_llama, 3, calibrate=batches, method="rtn", group=8, transform="rotate")
    same(found, rtn(quantize.transforms.rotate(shared_llama), bits=3, group=8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: one_shot(m, 3, calibrate=t, method="best"), "there is no rounding 'best'"),
        (lambda m, t: one_shot(m, 3, calibrate=t, transform="awk"), r"transform is one of .*; got 'awk'"),
        (lambda m, t: one_shot(m, 3, calibrate=t, group=7), "groups of 7 do not fill"),
        (lambda m, t: one_shot(m, 3, calibrate=t, embeddings=9), "bits must be"),
        (lambda m, t: one_shot(m, 3, calibrate=t, allocate="both"), "allocate is 'loss' or 'output', got 'both'"),
        (lambda m, t: one_shot(m, 3, calibrate=[]), "calibration needs a text file or batches"),
        (lambda m, t: one_shot(m, 3, calibrate=t, resume=True), "resume=True continues what is in store="),
        (lambda m, t: one_shot(m, 3, calibrate=t, heal=-1), "heal is a whole number of steps from 0, got -1"),
        (
            lambda m, t: one_shot(m, calibrate=t, grid="mxfp4", indivisible="ragged", heal=1),
            "which the grids of gptq do not have",
        ),
        (lambda m, t: one_shot(m, 3, calibrate=t, guide="luck"), "guide is 'attention' or 'loss', got 'luck'"),
        (lambda m, t: one_shot(m, 3, calibrate=t, guide="loss", method="rtn"), "weighs Gram matrices, and rtn asks"),
        (lambda m, t: one_shot(m, 3, calibrate=t, guide="loss", store="x"), "no finished blocks to keep in store="),
        (lambda m, t: one_shot(m, 3, calibrate=t, guide="loss", method="reconstruct"), "and reconstruct asks for none"),
        (lambda m, t: one_shot(m, 3, calibrate=t, method="reconstruct", step=3), "no option 'step' .did you mean"),
        (lambda m, t: one_shot(m, 3, calibrate=t, method="reconstruct", train="luck"), "train is one of"),
        (lambda m, t: one_shot(m, 3, calibrate=t, transform="qllm"), r"transform is one of awq, rotate, smooth"),
    ],
)
def test_refusals(shared_llama: Path, call: Any, message: str):
    with pytest.raises(Error, match=message):
        call(shared_llama, str(shared_llama.parent / "near.txt"))
