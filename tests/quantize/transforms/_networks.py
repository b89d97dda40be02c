"""Small networks of several architectures, with inputs, for the tests of transforms."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightsmith.graph import UnitGraph, trace

NAMES = ("llama", "qwen3", "phi3", "gpt2", "vit", "mlp")


def network(name: str) -> tuple[nn.Module, Any]:
    """A network in evaluation mode whose norms have gains (and biases) of their own, and what it is called with."""
    torch.manual_seed(0)
    words = {"input_ids": torch.randint(0, 19, (2, 7))}
    if name == "mlp":
        model: Any = nn.Sequential(
            nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 3)
        )
        return model.eval(), torch.randn(5, 6)
    hf = pytest.importorskip("transformers", reason="builds Hugging Face models")
    usual = {
        "vocab_size": 19, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**usual, tie_word_embeddings=True))
    elif name == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**usual, head_dim=4, tie_word_embeddings=False))
    elif name == "phi3":
        model = hf.Phi3ForCausalLM(hf.Phi3Config(**usual, tie_word_embeddings=False))
    elif name == "gpt2":
        config = hf.GPT2Config(vocab_size=19, n_embd=24, n_layer=2, n_head=4, n_positions=16, initializer_range=0.3)
        model = hf.GPT2LMHeadModel(config)
    else:
        config = hf.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8,
            patch_size=4, initializer_range=0.3,
        )  # fmt: skip
        model, words = hf.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval(), words


@functools.cache
def traced(name: str) -> UnitGraph:
    """The graph of a network."""
    return trace(*network(name), verify=False)


@torch.no_grad()
def answers(model: nn.Module, inputs: Any) -> Tensor:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model holds."""
    return {name: value.clone() for name, value in model.state_dict().items()}
