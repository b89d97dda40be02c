"""GPTQ and AWQ folders in GPTQModel, to the bit; it asks for a newer torch than ours, and runs where it is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws

gptqmodel = pytest.importorskip(
    "gptqmodel", reason="needs GPTQModel 7.7 with a torch that it takes", exc_type=ImportError
)
transformers = pytest.importorskip("transformers", reason="loads a Hugging Face model", exc_type=ImportError)
tokenizers = pytest.importorskip("tokenizers", reason="makes a tokenizer", exc_type=ImportError)

TOKENS = torch.tensor([[5, 60, 7, 33, 21, 12, 40, 3, 9]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights whose layers are wide enough for the kernels."""
    folder = tmp_path_factory.mktemp("gptqmodel") / "whole"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize(
    ("format", "bits", "symmetric"),
    [("gptq", 2, True), ("gptq", 3, True), ("gptq", 4, True), ("gptq", 8, True), ("gptq_v2", 4, False),
     ("awq", 4, False)],
)  # fmt: skip
def test_it_computes_what_the_codes_say(format: str, bits: int, symmetric: bool, whole: Path, tmp_path: Path):
    coded = ws.quantize.rtn(whole, bits=bits, group=32, symmetric=symmetric, scale_dtype="float16")
    ws.quantize.formats.pack(coded, format).save(tmp_path / "coded")
    ws.quantize.dequantize(coded).save(tmp_path / "floats")
    backend = gptqmodel.BACKEND.AWQ_TORCH if format == "awq" else gptqmodel.BACKEND.GPTQ_TORCH
    found = gptqmodel.GPTQModel.load(str(tmp_path / "coded"), backend=backend, device="cpu", dtype=torch.float16)
    plain = transformers.AutoModelForCausalLM
    expected = logits(plain.from_pretrained(tmp_path / "floats", dtype=torch.float16))
    assert torch.equal(logits(found.model), expected)
    assert (expected - logits(plain.from_pretrained(whole, dtype=torch.float16))).abs().max() > 0.05
