"""``weightsmith cut``: smaller models that load, told before and after; wrong calls found at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weightsmith as ws
from weightsmith.graph import of


@pytest.mark.parametrize("score", ["l1", "taylor", "kcm"])
def test_a_smaller_model_that_loads(run, llama: Path, score: str):
    from transformers import LlamaForCausalLM

    folder = llama.parent
    status, out, err = run("cut", llama, "-o", folder / "small", "--keep", 0.7, "--score", score, "--json",
                           "--calibrate", folder / "near.txt", "--samples", 4, "--length", 32,
                           "--evaluate", folder / "far.txt")  # fmt: skip
    assert status == 0, err
    told = json.loads(out)["cut"]
    model = LlamaForCausalLM.from_pretrained(folder / "small")
    counted = sum(p.numel() for p in model.parameters())
    assert told["after"]["parameters"] == counted <= 0.7 * told["before"]["parameters"]
    assert told["kept"] == pytest.approx(counted / told["before"]["parameters"])
    assert told["loads"] == "LlamaForCausalLM"
    assert [row["model"] for row in told["perplexity"]] == ["before", "after"]
    config = json.loads((folder / "small" / "config.json").read_text())
    neurons, groups = told["spaces"]["neurons"], told["spaces"]["groups"]
    assert 3 * config["intermediate_size"] == neurons["after"]
    assert 3 * config["num_key_value_heads"] == groups["after"]


def test_only_neurons_in_multiples_by_flops(run, llama: Path):
    folder = llama.parent
    status, out, err = run("cut", llama, "-o", folder / "small", "--keep", 0.8, "--budget", "flops", "--kind",
                           "neurons", "--multiple", 8, "--scope", "uniform", "--length", 16)  # fmt: skip
    assert status == 0, err
    assert "neurons" in out
    assert "loads in transformers as LlamaForCausalLM" in out
    after = of(ws.open(folder / "small"))
    assert after.sizes["layers.0.neurons"] % 8 == 0
    assert after.sizes["layers.0.neurons"] < 24
    assert after.sizes["layers.0.groups"] == 2


def test_layers_go_and_then_units(run, llama: Path):
    folder = llama.parent
    status, out, err = run("cut", llama, "-o", folder / "small", "--layers", 2, "--keep", 0.9, "--json",
                           "--calibrate", folder / "near.txt", "--samples", 2, "--length", 16)  # fmt: skip
    assert status == 0, err
    told = json.loads(out)["cut"]
    assert len(told["layers"]) == 2
    config = json.loads((folder / "small" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert told["after"]["parameters"] < 0.9 * told["before"]["parameters"]


def test_healed_it_says_more_of_what_the_whole_model_says(run, llama: Path):
    folder = llama.parent
    told, outputs = {}, {}
    for steps in (0, 30):
        status, out, err = run("cut", llama, "-o", folder / f"small{steps}", "--keep", 0.7, "--json", "--heal", steps,
                               "--calibrate", folder / "near.txt", "--samples", 6, "--length", 32)  # fmt: skip
        assert status == 0, err
        told[steps], outputs[steps] = json.loads(out)["cut"], ws.open(folder / f"small{steps}")
    assert told[30].pop("healed") == {"steps": 30, "stages": ["blocks", "all"]}
    assert told[30] == told[0]
    assert {name: outputs[30].spec(name) for name in outputs[30]} == {n: outputs[0].spec(n) for n in outputs[0]}
    report = ws.inspect.language({f"{steps}": weights for steps, weights in outputs.items()},
                                 [str(folder / "near.txt")], ws.open(llama), windows=4, length=32)  # fmt: skip
    off = {row["model"]: row["KL"] for row in report.rows()}
    assert off["30"] < 0.9 * off["0"]


def test_healing_fewer_layers_leaves_the_blocks_out_and_says_so(run, llama: Path):
    folder = llama.parent
    status, out, err = run("cut", llama, "-o", folder / "small", "--layers", 2, "--heal", 1,
                           "--calibrate", folder / "near.txt", "--samples", 2, "--length", 16)  # fmt: skip
    assert status == 0, err
    assert "the model has 2 and the teacher 3" in err
    assert "healed: 1 steps of the whole" in out


def test_what_the_config_ties_together_stays(run, tmp_path: Path):
    """GPT-2 has one number for the stream and for all heads: neurons go, and heads are refused before long work."""
    transformers = pytest.importorskip("transformers", reason="builds Hugging Face models")
    config = transformers.GPT2Config(
        vocab_size=13, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    status, out, err = run("cut", tmp_path / "model", "-o", tmp_path / "small", "--keep", 0.8, "--json")
    assert status == 0, err
    assert list(json.loads(out)["cut"]["spaces"]) == ["neurons"]
    status, _, err = run("cut", tmp_path / "model", "-o", tmp_path / "other", "--keep", 0.9, "--kind", "heads")
    assert status == 2
    assert "--kind heads: they cannot be cut alone: n_embd" in err


def test_a_network_with_its_graph(run, tmp_path: Path):
    weights = ws.Weights.of({"up": torch.rand(8, 4), "down": torch.rand(3, 8)})
    weights.save(tmp_path / "net.safetensors")
    ws.graph.declare(weights, {"up": "> u, 4", "down": "3, < u"}).save(tmp_path / "graph.json")
    call = ("cut", tmp_path / "net.safetensors", "-o", tmp_path / "out.safetensors", "--keep", 0.5,
            "--graph", tmp_path / "graph.json")  # fmt: skip
    status, out, err = run(*call)
    assert status == 0, err
    assert "56" in out
    assert ws.open(tmp_path / "out.safetensors").spec("up").shape == (4, 4)
    status, _, err = run(*call)
    assert status == 2
    assert "--overwrite" in err
    assert run(*call, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to cut"),
        (("--keep", 0.5, "--score", "taylor"), "reads a text"),
        (("--layers", 2), "reads a text"),
        (("--keep", 0.5, "--heal", 5), "--heal trains on a text"),
        (("--keep", 0), "--keep"),
        (("--keep", 0.5, "--kind", "neuron"), "did you mean 'neurons'"),
        (("--keep", 0.01), "not possible"),
        (("--keep", 0.5, "--calibrate", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_wrong_calls(run, llama: Path, words, said: str):
    status, _, err = run("cut", llama, "-o", llama.parent / "small", *words)
    assert status == 2
    assert said in err
    assert not (llama.parent / "small").exists()
