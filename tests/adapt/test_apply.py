"""An adapter merged into a model, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

import weightsmith as ws
from weightsmith.weights import Weights

from .conftest import adapter, factors, random


def test_the_formula_by_hand(base):
    parts = factors("fc", 5, 4)
    a, b = parts.values()
    merged = ws.adapt.apply(base, adapter(parts))
    for row in range(5):
        for column in range(4):
            change = sum(float(b[row, rank]) * float(a[rank, column]) for rank in range(2))
            expected = float(base["fc.weight"][row, column]) + 3 / 2 * change
            assert float(merged["fc.weight"][row, column]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch.equal(merged["out.weight"], base["out.weight"])
    assert list(merged) == list(base)


def test_the_root_of_the_rank(base):
    parts = factors("fc", 5, 4)
    a, b = parts.values()
    found = ws.adapt.apply(base, adapter(parts, use_rslora=True))["fc.weight"]
    torch.testing.assert_close(found, base["fc.weight"] + 3 / math.sqrt(2) * b @ a)


@pytest.mark.parametrize("pattern", ["fc", "^fc", "f.", "no|fc"])
def test_a_pattern_sets_rank_and_alpha(pattern, base):
    parts = factors("fc", 5, 4, rank=4)
    a, b = parts.values()
    found = ws.adapt.apply(base, adapter(parts, rank_pattern={"c": 9, pattern: 4}, alpha_pattern={pattern: 5}))
    torch.testing.assert_close(found["fc.weight"], base["fc.weight"] + 5 / 4 * b @ a)


def test_magnitudes_by_hand(base):
    parts = factors("fc", 5, 4) | {"fc.lora_magnitude_vector": torch.arange(1.0, 6.0)}
    a, b, magnitude = parts.values()
    merged = ws.adapt.apply(base, adapter(parts, use_dora=True))["fc.weight"]
    torch.testing.assert_close(merged.norm(dim=1), magnitude)
    direction = base["fc.weight"] + 1.5 * b @ a
    torch.testing.assert_close(merged, magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True))
    half = ws.adapt.apply(base, adapter(parts, use_dora=True), 0.5)["fc.weight"]
    torch.testing.assert_close(half, (merged + base["fc.weight"]) / 2)


def test_a_row_of_zeros_keeps_its_magnitude_to_itself():
    parts = {"fc.lora_A.weight": torch.ones(2, 3), "fc.lora_B.weight": torch.zeros(4, 2)}
    weight = torch.ones(4, 3)
    weight[1] = 0
    found = ws.adapt.apply(
        {"fc.weight": weight}, adapter(parts | {"fc.lora_magnitude_vector": torch.ones(4)}, use_dora=True)
    )["fc.weight"]
    assert found.isfinite().all()
    assert torch.equal(found[1], torch.zeros(3))


def test_magnitudes_the_other_way_round_are_those_of_columns():
    parts = factors("fc", 5, 4) | {"fc.lora_magnitude_vector": torch.arange(1.0, 6.0)}
    straight, turned = {"fc.weight": random(5, 4)}, {"fc.weight": random(5, 4).T.contiguous()}
    one, other = (ws.adapt.apply(model, adapter(parts, use_dora=True))["fc.weight"] for model in (straight, turned))
    torch.testing.assert_close(one.T, other)


@pytest.mark.parametrize("amount", [0.0, 0.25, -1.0, 2.0])
def test_the_amount_scales_the_change(amount, base):
    made = adapter(factors("fc", 5, 4) | {"fc.bias": random(5, seed=9)})
    whole, part = ws.adapt.apply(base, made), ws.adapt.apply(base, made, amount)
    for name in base:
        torch.testing.assert_close(part[name], base[name] + amount * (whole[name] - base[name]), rtol=1e-5, atol=1e-6)
    if amount == 0:
        assert all(torch.equal(part[name], base[name]) for name in base)


def test_an_amount_by_tensor(base):
    made = adapter(factors("fc", 5, 4) | factors("out", 3, 5))
    found = ws.adapt.apply(base, made, {"fc.*": 0.0, "*": 1.0})
    assert torch.equal(found["fc.weight"], base["fc.weight"])
    assert torch.equal(found["out.weight"], ws.adapt.apply(base, made)["out.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype, base):
    made = adapter(factors("fc", 5, 4))
    low = {name: value.to(dtype) for name, value in base.items()}
    found = ws.adapt.apply(low, made)["fc.weight"]
    exact = ws.adapt.apply({name: value.float() for name, value in low.items()}, made)["fc.weight"]
    assert torch.equal(found, exact.to(dtype))
    doubled = ws.adapt.apply(low, made) * 2 - ws.open(low)  # not rounded between two steps
    expected = (exact * 2 - low["fc.weight"].float()).to(dtype)
    assert torch.equal(doubled["fc.weight"], expected)


@pytest.mark.usefixtures("small_pieces")
def test_the_bytes_do_not_depend_on_pieces_or_threads(tmp_path):
    """Every kind of change, on weights of several pieces."""
    model = {
        "fc.weight": random(40, 8, seed=1),
        "turned.weight": random(6, 30, seed=2),
        "conv.weight": random(20, 3, 3, 3, seed=3),
        "embed.weight": random(50, 4, seed=4),
        "tokens.weight": random(50, 4, seed=5),
        "experts.w": random(5, 6, 7, seed=6),
        "whole.weight": random(9, 9, seed=7),
        "fc.bias": random(40, seed=8),
    }
    tensors = {
        **factors("fc", 40, 8),
        "fc.lora_B.bias": random(40, seed=20),
        **factors("turned", 30, 6),
        "conv.lora_A.weight": random(2, 3, 3, 3, seed=21),
        "conv.lora_B.weight": random(20, 2, 1, 1, seed=22),
        "embed.lora_embedding_A": random(2, 50, seed=23),
        "embed.lora_embedding_B": random(4, 2, seed=24),
        "tokens.token_adapter.trainable_tokens_delta": random(3, 4, seed=25),
        "experts.lora_A.weight": random(10, 7, seed=26),
        "experts.lora_B.weight": random(6, 10, seed=27),
        "whole.weight": random(9, 9, seed=28),
    }
    settings = {
        "lora_bias": True,
        "target_parameters": ["experts.w"],
        "trainable_token_indices": {"tokens": [49, 0, 17]},
        "modules_to_save": ["whole"],
    }
    made = adapter(tensors, **settings)
    expected = ws.adapt.apply(model, made, 0.5).to_dict()
    for threads in (1, 3):
        ws.adapt.apply(model, made, 0.5).save(tmp_path / f"{threads}.safetensors", threads=threads)
        found = ws.open(tmp_path / f"{threads}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()
    # and they are what the formulas say
    by_name = {name: value.double() for name, value in tensors.items()}
    product = by_name["embed.lora_embedding_B"] @ by_name["embed.lora_embedding_A"]
    torch.testing.assert_close(
        expected["embed.weight"].double(), model["embed.weight"].double() + 0.75 * product.T, rtol=1e-5, atol=1e-5
    )
    product = by_name["turned.lora_B.weight"] @ by_name["turned.lora_A.weight"]
    torch.testing.assert_close(
        expected["turned.weight"].double(), model["turned.weight"].double() + 0.75 * product.T, rtol=1e-5, atol=1e-5
    )
    for expert in range(5):
        a = by_name["experts.lora_A.weight"][2 * expert : 2 * expert + 2]
        b = by_name["experts.lora_B.weight"][:, expert::5]
        torch.testing.assert_close(
            expected["experts.w"][expert].double(),
            model["experts.w"][expert].double() + 0.75 * b @ a,
            rtol=1e-5,
            atol=1e-5,
        )
    rows = tensors["tokens.token_adapter.trainable_tokens_delta"]
    for place, index in enumerate((49, 0, 17)):
        torch.testing.assert_close(expected["tokens.weight"][index], (model["tokens.weight"][index] + rows[place]) / 2)
    assert torch.equal(expected["tokens.weight"][1:17], model["tokens.weight"][1:17])
    torch.testing.assert_close(expected["fc.bias"], model["fc.bias"] + 0.75 * tensors["fc.lora_B.bias"])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("turned", [False, True])
def test_streamed_magnitudes(turned, tmp_path):
    weight = random(40, 24)
    parts = factors("fc", 40, 24) | {"fc.lora_magnitude_vector": random(40, seed=3).abs()}
    model = {"fc.weight": weight.T.contiguous() if turned else weight}
    merged = ws.adapt.apply(model, adapter(parts, use_dora=True))
    merged.save(tmp_path / "out.safetensors", threads=3)
    a, b, magnitude = parts.values()
    direction = weight + 1.5 * b @ a
    expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    found = ws.open(tmp_path / "out.safetensors")["fc.weight"]
    torch.testing.assert_close(found.T if turned else found, expected, rtol=1e-5, atol=1e-5)


def test_factors_that_are_computed_themselves(base):
    """A lazy adapter, and one whose rows cannot be read in part."""
    parts = factors("fc", 4, 5)
    plain = adapter(parts)
    turned = {"fc.weight": base["fc.weight"]}  # [5, 4] for a layer from 5 to 4
    expected = ws.adapt.apply(turned, plain)["fc.weight"]
    torch.testing.assert_close(ws.adapt.apply(turned, plain.cast("float64").cast("float32"))["fc.weight"], expected)
    strided = adapter({name: value.T.contiguous().T for name, value in parts.items()})
    torch.testing.assert_close(ws.adapt.apply(turned, strided)["fc.weight"], expected)


def test_a_view_is_computed_from_what_is_there_then(base):
    made = adapter(factors("fc", 5, 4))
    merged = ws.adapt.apply(base, made)
    before = merged["fc.weight"]
    base["fc.weight"] += 1
    torch.testing.assert_close(merged["fc.weight"], before + 1)


def test_from_folders(tmp_path, base):
    Weights.of(base).with_files({"config.json": b"{}", "adapter_config.json": b"{}"}).save(tmp_path / "base")
    made = adapter(factors("fc", 5, 4))
    expected = ws.adapt.apply(base, made)["fc.weight"]
    for suffix in ("safetensors", "bin"):
        folder = tmp_path / suffix
        folder.mkdir()
        made.save(folder / f"adapter_model.{suffix}")
        (folder / "adapter_config.json").write_bytes(made.files["adapter_config.json"])
        Weights.of({"unrelated": torch.ones(1)}).save(folder / "model.safetensors")
        for place in (folder, str(folder), folder / f"adapter_model.{suffix}"):
            merged = ws.adapt.apply(tmp_path / "base", place)
            assert torch.equal(merged["fc.weight"], expected)
    assert set(merged.files) == {"config.json"}  # a folder with an adapter's settings would be taken for one


def test_the_lineage_says_what_was_merged(base):
    merged = ws.adapt.apply(base, adapter(factors("fc", 5, 4)), 0.5)
    assert merged.lineage.method == "adapt.apply"
    assert merged.lineage.options == {"amount": 0.5, "scale": 1.5}
    assert len(merged.lineage.inputs) == 2


# Which tensor is meant


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model.model.", "base_model.model.a.b."])
def test_another_start_of_the_names(prefix, base):
    parts = factors("layer.fc", 5, 4) | factors("layer.out", 3, 5)
    model = {f"net.layer.{name}": value for name, value in base.items()}
    found = ws.adapt.apply(model, adapter(parts, prefix))
    assert not torch.equal(found["net.layer.fc.weight"], base["fc.weight"])
    torch.testing.assert_close(
        found["net.layer.out.weight"], ws.adapt.apply(base, adapter(factors("out", 3, 5)))["out.weight"]
    )


def test_two_possible_starts_are_one_too_many(base):
    model = {f"{side}.{name}": value for name, value in base.items() for side in ("encoder", "decoder")}
    with pytest.raises(ws.Error, match=r"'decoder\.', 'encoder\.'"):
        ws.adapt.apply(model, adapter(factors("fc", 5, 4)))


def test_what_does_not_match_is_listed(base):
    with pytest.raises(ws.Error, match=r"1 of 2 modules are not in the model \(attn\.q\); the model has fc, out"):
        ws.adapt.apply(base, adapter(factors("attn.q", 5, 4) | factors("fc", 5, 4)))
    with pytest.raises(ws.Error, match=r"has other\.bias, and the model has no other\.bias"):
        ws.adapt.apply(base, adapter(factors("fc", 5, 4) | {"other.bias": torch.ones(2)}))


def test_a_head_that_the_base_lacks_is_added(base):
    head = random(2, 3, seed=5)
    made = adapter(factors("fc", 5, 4) | {"score.weight": head}, modules_to_save=["score"])
    for amount in (1.0, 0.3):
        assert torch.equal(ws.adapt.apply(base, made, amount)["score.weight"], head)


@pytest.mark.parametrize("name", ["fc.modules_to_save.weight", "fc.modules_to_save.default.weight", "fc.weight"])
def test_modules_saved_whole_under_old_names(name, base):
    value = random(5, 4, seed=7).to(torch.bfloat16)
    found = ws.adapt.apply(base, adapter(factors("out", 3, 5) | {name: value}, modules_to_save=["fc"]))
    assert torch.equal(found["fc.weight"], value.float())


def test_names_with_the_adapters_own(base):
    parts = {name.replace(".weight", ".default.weight"): value for name, value in factors("fc", 5, 4).items()}
    plain = ws.adapt.apply(base, adapter(factors("fc", 5, 4)))
    assert torch.equal(ws.adapt.apply(base, adapter(parts))["fc.weight"], plain["fc.weight"])


@pytest.mark.parametrize("told", [True, False])
def test_a_square_weight_lies_as_its_neighbours_do(told):
    """The biases around a square weight say which way round it is, whatever the settings say."""
    weight, bias, parts = random(4, 4), torch.zeros(4), factors("h.0.proj", 4, 4)
    a, b = parts.values()
    turned = {
        "h.0.proj.weight": weight,
        "h.0.proj.bias": bias,
        "h.0.fc.weight": random(4, 9),
        "h.0.fc.bias": torch.ones(9),
    }
    straight = turned | {"h.0.fc.weight": random(9, 4)}
    alone = {"h.0.proj.weight": weight, "h.1.fc.weight": random(4, 9), "h.1.fc.bias": torch.ones(9)}
    change = 1.5 * b @ a
    for model, expected in ((turned, change.T), (straight, change), (alone, change.T if told else change)):
        found = ws.adapt.apply(model, adapter(parts, fan_in_fan_out=told))["h.0.proj.weight"]
        torch.testing.assert_close(found, weight + expected)


# One tensor with two names


CONFIG = {"config.json": json.dumps({"tie_word_embeddings": True, "vocab_size": 6}).encode()}


def tied_models() -> dict[str, Weights]:
    table = random(6, 4)
    rest = {"layers.0.fc.weight": random(5, 4, seed=3)}
    return {
        "two names": Weights.of({"model.embed_tokens.weight": table, "lm_head.weight": table} | rest).with_files(
            CONFIG
        ),
        "one name": Weights.of({"model.embed_tokens.weight": table} | rest).with_files(CONFIG),
    }


@pytest.mark.parametrize("stored", tied_models())
@pytest.mark.parametrize("target", ["embedding", "head", "saved"])
def test_a_tied_tensor(stored, target):
    model = tied_models()[stored]
    table = model["model.embed_tokens.weight"]
    a, b = random(2, 6, seed=1), random(4, 2, seed=2)
    tensors, changed, at = {
        "embedding": ({"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b},
                      table + 1.5 * (b @ a).T, "model.embed_tokens.weight"),
        "head": ({"lm_head.lora_A.weight": b.T.contiguous(), "lm_head.lora_B.weight": a.T.contiguous()},
                 table + 1.5 * a.T @ b.T, "lm_head.weight"),
        "saved": ({"model.embed_tokens.weight": table + 1} | factors("layers.0.fc", 5, 4),
                  table + 1, "model.embed_tokens.weight"),
    }[target]  # fmt: skip
    settings = {"modules_to_save": ["embed_tokens"]} if target == "saved" else {}
    made = adapter(tensors, **settings)
    with pytest.raises(ws.Error, match="tied='keep' to change both"):
        ws.adapt.apply(model, made)
    kept = ws.adapt.apply(model, made, tied="keep")
    torch.testing.assert_close(kept["model.embed_tokens.weight"], changed)
    assert list(kept) == list(model)
    assert kept.ties == model.ties
    assert json.loads(kept.files["config.json"])["tie_word_embeddings"] is True
    apart = ws.adapt.apply(model, made, tied="untie")
    other = {"model.embed_tokens.weight", "lm_head.weight"} - {at}
    torch.testing.assert_close(apart[at], changed)
    assert torch.equal(apart[other.pop()], table)
    assert not apart.ties
    assert json.loads(apart.files["config.json"]) == {"tie_word_embeddings": False, "vocab_size": 6}
    with pytest.raises(ws.Error, match="tied='keep'"):  # the setting alone is not enough: PEFT may not have kept it
        ws.adapt.apply(model, adapter(tensors, ensure_weight_tying=True, **settings))


def test_a_tie_that_training_kept():
    """Embedding and head have one change between them, which is made once."""
    a, b = random(2, 6, seed=1), random(4, 2, seed=2)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    tensors |= {"lm_head.lora_A.weight": b.T.contiguous(), "lm_head.lora_B.weight": a.T.contiguous()}
    for model in tied_models().values():
        table = model["model.embed_tokens.weight"]
        found = ws.adapt.apply(model, adapter(tensors, ensure_weight_tying=True))
        torch.testing.assert_close(found["model.embed_tokens.weight"], table + 1.5 * (b @ a).T)
        assert list(found) == list(model)


def test_two_changes_of_one_tensor_cannot_be_kept_in_it():
    a, b = random(2, 6, seed=1), random(4, 2, seed=2)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    tensors |= factors("lm_head", 6, 4)
    with pytest.raises(ws.Error, match="only tied='untie' can do both"):
        ws.adapt.apply(tied_models()["one name"], adapter(tensors), tied="keep")


def test_a_copy_of_the_base_under_a_product(base):
    """PEFT saves the embedding along where it was enlarged."""
    model = {"embed.weight": random(6, 4)}
    tensors = {"embed.base_layer.weight": random(6, 4, seed=8), "embed.lora_embedding_A": random(2, 6, seed=1),
               "embed.lora_embedding_B": random(4, 2, seed=2)}  # fmt: skip
    copy, a, b = tensors.values()
    torch.testing.assert_close(ws.adapt.apply(model, adapter(tensors))["embed.weight"], copy + 1.5 * (b @ a).T)


# Refusals


def lacking(tensors, name):
    return {key: value for key, value in tensors.items() if name not in key}


FC = factors("fc", 5, 4)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (FC, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        (FC, {"peft_type": None}, "peft_type is None"),
        (FC, {"use_qalora": True}, "use_qalora is true"),
        (FC, {"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]"),
        (FC, {"layer_replication": [[0, 2]]}, "layer_replication"),
        (FC, {"use_bdlora": {"n": 1}}, "use_bdlora"),
        (FC, {"kasa_config": {"beta": 0.1}}, "kasa_config"),
        (FC, {"something_new": 3}, "something_new is 3"),
        (FC, {"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        (FC, {"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        (FC, {"r": 0}, "r is 0"),
        (FC, {"r": 4}, "has the rank 4 by"),
        (FC, {"rank_pattern": {"fc": 3}}, "has the rank 3 by"),
        (FC, {"rank_pattern": {"(": 3}}, "no regular expression"),
        (FC, {"use_dora": True}, "has no magnitude vector"),
        (FC | {"fc.lora_magnitude_vector": torch.ones(5)}, {}, "has a magnitude vector"),
        (FC | {"fc.lora_magnitude_vector": torch.ones(4)}, {"use_dora": True}, "not 5 numbers"),
        (FC | {"fc.lora_B.bias": torch.ones(5)}, {}, "lora_bias is false"),
        (lacking(FC, "lora_B"), {}, "no lora_B"),
        (lacking(FC, "lora_A"), {}, "no lora_A"),
        (FC | {"fc.lora_E": torch.ones(2, 1)}, {}, "belongs to no kind of LoRA"),
        (FC | {"fc.lora_A.one.weight": torch.ones(2, 4), "out.lora_A.two.weight": torch.ones(2, 5)}, {}, "two tensors"),
        ({"fc.lora_A.one.weight": torch.ones(2, 4), "fc.lora_B.two.weight": torch.ones(5, 2)}, {}, "several adapters"),
        (factors("fc", 4, 3), {}, r"make \[4, 3\], but fc.weight is \[5, 4\]"),
        ({"fc.lora_A.weight": torch.ones(2), "fc.lora_B.weight": torch.ones(5, 2)}, {}, "not a matrix"),
        (FC | {"out.weight": torch.ones(4, 5)}, {}, r"replaces out.weight \[3, 5\] by \[4, 5\]"),
        (factors("out", 3, 5) | {"out.lora_B.bias": torch.ones(3)}, {"lora_bias": True}, "no out.bias"),
        ({"fc.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}, {"trainable_token_indices": [1]}, "2 trained"),
        ({"fc.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}, {"trainable_token_indices": [5]}, "do not fit"),
        ({"fc.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}, {}, "trainable_token_indices is None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(tensors, settings, message, base):
    with pytest.raises(ws.Error, match=message):
        ws.adapt.apply(base, adapter(tensors, **settings))


def test_harmless_settings_are_taken(base):
    made = adapter(FC, lora_dropout=0.1, task_type="CAUSAL_LM", init_lora_weights="gaussian", something_new=None)
    assert torch.equal(ws.adapt.apply(base, made)["fc.weight"], ws.adapt.apply(base, adapter(FC))["fc.weight"])


def test_an_adapter_without_settings(base, tmp_path):
    with pytest.raises(ws.Error, match=r"no adapter_config\.json"):
        ws.adapt.apply(base, FC)
    for text in (b"{", b"[]"):
        with pytest.raises(ws.Error, match="adapter_config"):
            ws.adapt.apply(base, Weights.of(FC).with_files({"adapter_config.json": text}))


def test_settings_in_the_header(base, tmp_path):
    words = {"lora_adapter_metadata": json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3})}
    named = Weights.of(FC)
    found = Weights({name: named.node(name) for name in named}, metadata=words)
    assert torch.equal(ws.adapt.apply(base, found)["fc.weight"], ws.adapt.apply(base, adapter(FC))["fc.weight"])


@pytest.mark.parametrize("amount", [float("nan"), float("inf"), "1"])
def test_an_amount_is_a_number(amount, base):
    with pytest.raises(ws.Error, match="amount"):
        ws.adapt.apply(base, adapter(FC), amount)


def test_other_refusals(base):
    with pytest.raises(ws.Error, match="tied is"):
        ws.adapt.apply(base, adapter(FC), tied="both")
    with pytest.raises(ws.Error, match="dequantize"):
        ws.adapt.apply(base | {"fc.weight": base["fc.weight"].to(torch.float8_e4m3fn)}, adapter(FC))
    with pytest.raises(ws.Error, match="no LoRA tensors"):
        ws.adapt.apply(base, Weights.of({}).with_files(adapter(FC).files))


def test_experts_that_fit_two_ways():
    parts = {"e.lora_A.weight": random(6, 4), "e.lora_B.weight": random(4, 6)}
    with pytest.raises(ws.Error, match="fits 2 ways"):
        ws.adapt.apply({"e.w": random(3, 4, 4)}, adapter(parts, target_parameters=["e.w"]))
    with pytest.raises(ws.Error, match="fits 0 ways"):
        ws.adapt.apply({"e.w": random(3, 4, 5)}, adapter(parts, target_parameters=["e.w"]))
