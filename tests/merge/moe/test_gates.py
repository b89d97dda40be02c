"""Routers from prompts: against transformers asked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge.moe import Expert, assemble
from weightsmith.merge.moe._gates import gates

transformers = pytest.importorskip("transformers", reason="needs transformers to read prompts", exc_type=ImportError)
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers", exc_type=ImportError)

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"]
PROMPTS = [(["a b", "c d e a"], ["b"]), (["e", "e d", "c c c"], [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(place)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    tokenizer.save_pretrained(place)
    return place


def ids(text: str) -> Tensor:
    return torch.tensor([[1, *(WORDS.index(word) for word in text.split())]])


def state(model: Any, text: str, mode: str, layer: int) -> Tensor:
    """One text's state, as ``mode`` takes it."""
    if mode == "inputs":
        seen: list[Tensor] = []
        module = model.model.layers[layer].post_attention_layernorm
        hook = module.register_forward_hook(lambda _, inputs, output: seen.append(output))
        model(ids(text))
        hook.remove()
        return seen[0][0].mean(0)
    hidden = model(ids(text), output_hidden_states=True).hidden_states[layer][0]
    return hidden.mean(0) if mode == "hidden_avg" else hidden[-1]


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "inputs"])
@torch.no_grad()
def test_states_of_every_layer(mode: str, folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = gates(mode, ws.open(folder), PROMPTS, 3, 16, 0)
    assert found.shape == (3, 2, 16)
    for layer in range(3):
        for expert, (positive, negative) in enumerate(PROMPTS):
            wanted = torch.stack([state(model, text, mode, layer) for text in positive]).mean(0)
            if negative:
                wanted = wanted - torch.stack([state(model, text, mode, layer) for text in negative]).mean(0)
            torch.testing.assert_close(found[layer, expert], wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_embeddings_are_the_same_in_all_layers(folder: Path):
    found = gates("cheap_embed", ws.open(folder), PROMPTS, 3, 16, 0)
    table = ws.open(folder)["model.embed_tokens.weight"]

    def unit(texts: list[str]) -> Tensor:
        total = torch.stack([table[index] for text in texts for index in ids(text)[0]]).sum(0)
        return total / total.norm()

    wanted = unit(PROMPTS[0][0]) - unit(PROMPTS[0][1])
    for layer in range(3):
        torch.testing.assert_close(found[layer, 0], wanted / wanted.norm())
        torch.testing.assert_close(found[layer, 1], unit(PROMPTS[1][0]))


def test_an_unsaved_base_will_do(folder: Path):
    """What reads the prompts is the weights that were given, and not a folder that they came from."""
    base = ws.open(folder)
    moved = base | {"model.embed_tokens.weight": base["model.embed_tokens.weight"].flip(0)}
    assert not torch.allclose(gates("hidden", moved, PROMPTS, 3, 16, 0), gates("hidden", base, PROMPTS, 3, 16, 0))


def test_gates_by_chance():
    base = ws.Weights.of({})
    prompts = [([], [])] * 4
    for mode, deviation, most in (("random", 1.0, 9.0), ("uniform_random", 1 / math.sqrt(300), 0.1)):
        one = gates(mode, base, prompts, 5, 100, 0)
        assert one.shape == (5, 4, 100)
        assert abs(one.std() / deviation - 1) < 0.05
        assert one.abs().max() <= most
        assert torch.equal(one, gates(mode, base, prompts, 5, 100, 0))
        assert not torch.equal(one, gates(mode, base, prompts, 5, 100, 1))
    assert not gates("zeros", base, prompts, 5, 100, 0).any()


@torch.no_grad()
def test_a_prompt_finds_its_expert(folder: Path):
    """The router that the prompts make sends them to the expert they were given for."""
    base = ws.open(folder)
    experts = [Expert(base, ["a b", "b a"]), Expert(base, ["e d", "d e"])]
    mixed = assemble(experts, base, gate="inputs", experts_per_token=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for layer in range(3):
        router = mixed[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        for number, expert in enumerate(experts):
            for text in expert.prompts:
                assert int((router @ state(model, text, "inputs", layer)).argmax()) == number


def test_what_cannot_be_read_is_refused(folder: Path):
    base = ws.open(folder)
    bare = ws.Weights({name: base.node(name) for name in base}, files={"config.json": base.files["config.json"]})
    with pytest.raises(Error, match="cannot use the tokenizer"):
        gates("hidden", bare, PROMPTS, 3, 16, 0)
    with pytest.raises(Error, match=r"does not fit its config.json: .*up_proj"):
        gates("hidden", base.drop("*.0.mlp.up_proj.*"), PROMPTS, 3, 16, 0)
    broken = base | {"model.embed_tokens.weight": torch.full((8, 16), torch.nan)}
    with pytest.raises(Error, match="NaN or infinity"):
        gates("hidden", broken, PROMPTS, 3, 16, 0)
