"""Packed folders before transformers: refused while they are packed, and loaded as they were once unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import weightsmith as ws

transformers = pytest.importorskip(
    "transformers", reason='needs transformers: pip install "weightsmith[peers]"', exc_type=ImportError
)


@pytest.mark.parametrize(
    ("format", "sparsity"), [("bitmask", 0.8), ("sparse-bitmask", 0.8), ("sparse-24-bitmask", "2:4")]
)
def test_nobody_loads_a_packed_folder_by_mistake(format, sparsity, tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    pruned = ws.prune.magnitude(tmp_path / "whole", sparsity)
    pruned.save(tmp_path / "pruned")
    ws.prune.formats.pack(tmp_path / "pruned", format).save(tmp_path / "packed")
    assert ws.prune.formats.sizes(tmp_path / "packed")["packed tensors"] == 7
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ws.prune.formats.unpack(tmp_path / "packed").save(tmp_path / "back")
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("pruned", "back")]
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        before, after = (model(tokens).logits for model in models)
    assert torch.equal(before, after)
