"""The same mixtures of experts as mergekit-moe, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.merge.moe import assemble_document
from weightsmith.merge.moe._targets import TARGETS

REASON = 'needs mergekit: pip install "weightsmith[peers]"'
theirs = pytest.importorskip("mergekit.scripts.moe", reason=REASON, exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason=REASON, exc_type=ImportError)

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    *["the", "cat", "sat", "on", "a", "mat", "def", "return", "if", "else", "for", "while", "print"],
]
PROMPTS = [["the cat sat", "on a mat the cat"], ["def return", "for if else print"]]


def model(folder: Path, kind: str, seed: int, dtype: torch.dtype, **more: Any) -> str:
    """A model of random weights with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **sizes, **more), dtype=dtype
        )
    made.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def both(document: dict[str, Any], folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], ws.Weights]:
    """Their tensors and settings, and our weights."""
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions

    out = folder / "theirs"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs.build(
            MoEMergeConfig.model_validate(document), str(out), MergeOptions(), device="cpu", allow_all_same=True
        )
    return ws.open(out).to_dict(), json.loads((out / "config.json").read_text()), assemble_document(document)


def document_of(folder: Path, kind: str, dtype: torch.dtype, mode: str, **more: Any) -> dict[str, Any]:
    paths = [model(folder / f"model{seed}", kind, seed, dtype, **more) for seed in range(3)]
    experts = [
        {"source_model": path, "positive_prompts": texts} for path, texts in zip(paths[1:], PROMPTS, strict=True)
    ]
    return {"base_model": paths[0], "gate_mode": mode, "experts": experts, "experts_per_token": 1}


def fused(mixed: ws.Weights, name: str) -> torch.Tensor:
    """What a fused tensor of theirs is in ours."""
    if name in mixed:
        return mixed[name]
    place = name.partition(".mlp.")[0]
    target = next(
        t for t in TARGETS.values() if any(f"{place}.{t.block}.experts.0.{t.projections[0]}" in n for n in mixed)
    )
    gate, up, down = target.projections
    if name.endswith(ROUTER):
        return mixed[f"{place}.{target.block}.gate.weight"]
    parts = (gate, up) if name.endswith("gate_up_proj") else (down,)
    block = f"{place}.{target.block}.experts"
    experts = sum(n.startswith(block) and n.endswith(f"{down}.weight") for n in mixed)
    return torch.stack([torch.cat([mixed[f"{block}.{e}.{part}.weight"] for part in parts]) for e in range(experts)])


ROUTER = ".gate.weight"
RANDOM = ("random", "uniform_random")

ROWS = [
    ("llama", None, False),
    ("mistral", None, False),
    ("llama", "deepseek", False),
    ("llama", "deepseek", True),
    ("llama", "qwen", True),
    ("qwen2", None, True),
    ("qwen3", None, False),
]


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden", "hidden_last", "hidden_avg", "random"])
@pytest.mark.parametrize(("kind", "architecture", "shared"), ROWS)
def test_the_same_tensors(kind: str, architecture: str | None, shared: bool, mode: str, tmp_path: Path):
    document = document_of(tmp_path, kind, torch.bfloat16, mode)
    if architecture:
        document["architecture"] = architecture
    if mode == "hidden_avg":  # theirs averages over padding too, so here all texts are of one length
        for expert, texts in zip(document["experts"], [["the cat sat"], ["def return print"]], strict=True):
            expert["positive_prompts"] = texts
    document["experts"][0] |= {"negative_prompts": ["while print else"], "residual_scale": 0.5}
    if shared:
        document["shared_experts"] = [{"source_model": document["base_model"], "residual_scale": 0.3}]
        if architecture != "deepseek":
            document["shared_experts"][0]["positive_prompts"] = ["the mat def"]
    tensors, settings, ours = both(document, tmp_path)
    if kind == "llama" and architecture == "qwen":  # they give it biases of zero, ours says that there are none
        biases = [name for name in tensors if name.endswith(".bias")]
        assert len(biases) == 6
        assert not any(tensors.pop(name).any() for name in biases)
    for name, tensor in tensors.items():
        found = fused(ours, name)
        assert (found.dtype, found.shape) == (torch.bfloat16, tensor.shape), name
        if not name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            assert torch.equal(found, tensor), name
        elif mode not in RANDOM:  # theirs rounds states to bfloat16 on the way
            torch.testing.assert_close(found, tensor, rtol=0.02, atol=0.01)
    assert ours.numel == sum(tensor.numel() for tensor in tensors.values())
    own = json.loads(bytes(ours.files["config.json"]))  # type: ignore[arg-type]
    for key in ("architectures", "model_type", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"):
        assert own.get(key) == settings.get(key), key
    counts = ("num_local_experts", "num_experts", "n_routed_experts")  # one word for it or another
    assert [own[key] for key in counts if key in own] == [settings[key] for key in counts if key in settings] == [2]
    assert own.get("n_shared_experts") == settings.get("n_shared_experts")


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
def test_gates_to_the_last_digit(mode: str, tmp_path: Path):
    document = document_of(tmp_path, "llama", torch.float32, mode)
    tensors, _, ours = both(document, tmp_path)
    for layer in range(2):
        found, wanted = (
            w[f"model.layers.{layer}.{b}.gate.weight"] for w, b in ((ours, "block_sparse_moe"), (tensors, "mlp"))
        )
        # Their base reads the prompts in bfloat16, ours in the dtype that it is stored in.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 if mode == "cheap_embed" else 0.02)


def test_noise_is_of_the_same_size(tmp_path: Path):
    document = document_of(tmp_path, "llama", torch.float32, "random")
    document["experts"][0]["noise_scale"] = 0.5
    tensors, _, ours = both(document, tmp_path)
    plain = ws.open(document["experts"][0]["source_model"])["model.layers.0.mlp.down_proj.weight"]
    found = ours["model.layers.0.block_sparse_moe.experts.0.w2.weight"] - plain
    wanted = tensors["model.layers.0.mlp.experts.down_proj"][0] - plain
    assert abs(found.std() / wanted.std() - 1) < 0.15
    assert abs(found.mean()) < 0.1
