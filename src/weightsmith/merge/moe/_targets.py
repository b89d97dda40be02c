"""How sparse models are written down: the names of their tensors, and their ``config.json``.

One row for each architecture. What a dense model's ``config.json`` leaves out is what its own class has by default,
and the sparse class may have another default: such settings are written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from weightsmith.errors import Error
from weightsmith.weights import dtype_name

ROUTER = "gate.weight"
FUSED = ("gate_up_proj", "down_proj")
"""A layer's experts as transformers 5 holds them: ``[experts, 2 * inner, hidden]``, ``[experts, hidden, inner]``."""

_ATTENTION = r"self_attn\.[qkvo]_proj\.weight|(input|post_attention)_layernorm\.weight"


@dataclass(frozen=True)
class Target:
    """One sparse architecture."""

    name: str
    """Its ``model_type``."""
    title: str
    """What mergekit calls it."""
    takes: tuple[str, ...]
    """``model_type`` of dense models that its attention, norms and MLPs are those of."""
    class_name: str
    inside: str
    """Pattern of what a layer may have beside its MLP."""
    count: str
    """The setting that says how many experts there are."""
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    with_shared: tuple[bool, ...] = (False,)
    """Whether it comes without and with a shared expert."""
    shared: str = ""
    shared_gate: str = ""
    fused: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()
    """Settings that are the width of an expert."""


_HUB = "deepseek-ai/deepseek-moe-16b-base--"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="mixtral",
            title="Mixtral",
            takes=("llama", "mistral"),
            class_name="MixtralForCausalLM",
            inside=_ATTENTION,
            count="num_local_experts",
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        ),
        Target(
            name="qwen2_moe",
            title="Qwen MoE",
            takes=("llama", "mistral", "qwen2"),
            class_name="Qwen2MoeForCausalLM",
            inside=_ATTENTION + r"|self_attn\.[qkv]_proj\.bias",
            count="num_experts",
            with_shared=(True,),
            shared="shared_expert",
            shared_gate="shared_expert_gate.weight",
            settings={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
            sizes=("moe_intermediate_size", "shared_expert_intermediate_size"),
        ),
        Target(
            name="qwen3_moe",
            title="Qwen3 MoE",
            takes=("qwen3",),
            class_name="Qwen3MoeForCausalLM",
            inside=_ATTENTION + r"|self_attn\.([qkvo]_proj\.bias|[qk]_norm\.weight)",
            count="num_experts",
            settings={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
            sizes=("moe_intermediate_size",),
        ),
        Target(
            name="deepseek",
            title="DeepSeek MoE",
            takes=("llama", "mistral"),
            class_name="DeepseekForCausalLM",
            inside=_ATTENTION,
            count="n_routed_experts",
            with_shared=(False, True),
            shared="shared_experts",
            fused=False,
            settings={
                "first_k_dense_replace": 0,
                "moe_layer_freq": 1,
                "scoring_func": "softmax",
                "norm_topk_prob": True,
                "auto_map": {
                    "AutoConfig": f"{_HUB}configuration_deepseek.DeepseekConfig",
                    "AutoModel": f"{_HUB}modeling_deepseek.DeepseekModel",
                    "AutoModelForCausalLM": f"{_HUB}modeling_deepseek.DeepseekForCausalLM",
                },
            },
            sizes=("moe_intermediate_size",),
        ),
    )
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
"""What a dense model has where its configuration says nothing."""

COMMON: dict[str, Any] = {
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
ROPE = 10000.0

_OF_THE_DENSE = ("_name_or_path", "auto_map", "mlp_bias", "pretraining_tp", "max_window_layers", "layer_types")


def settings(
    target: Target,
    config: Mapping[str, Any],
    experts: int,
    per_token: int,
    shared: bool,
    sizes: Mapping[str, int],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """``config.json`` of the sparse model.

    Args:
        config: of the dense one.
        experts, per_token: how many there are, and work on a token.
        shared: whether an expert works on all tokens.
        sizes: what the tensors say.
        dtype: of all of them, if it was asked for.
    """
    kind = config["model_type"]
    found = {**COMMON, **DEFAULTS[kind], **config}
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if not any(found.get(key) for key in ("rope_theta", "rope_parameters")):
        found["rope_theta"] = ROPE
    if found.get("head_dim", 0) is None:
        del found["head_dim"]
    windows = _windows(target, kind, found, sizes["num_hidden_layers"])
    for key in (*_OF_THE_DENSE, "sliding_window", "use_sliding_window"):
        found.pop(key, None)
    found |= {"architectures": [target.class_name], "model_type": target.name, **sizes, **windows, **target.settings}
    found |= {target.count: experts, "num_experts_per_tok": per_token}
    found |= dict.fromkeys(target.sizes, sizes["intermediate_size"])
    if target.name == "qwen2_moe":
        found["qkv_bias"] = kind == "qwen2"
    if target.name == "deepseek":
        found["n_shared_experts"] = 1 if shared else None
    if dtype is not None:
        found["dtype" if "dtype" in found else "torch_dtype"] = dtype_name(dtype)
    return found


def _windows(target: Target, kind: str, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """How far attention looks back, in the words of the target."""
    width = config.get("sliding_window")
    if kind in ("llama", "mistral"):
        ranged = [kind == "mistral" and width is not None] * layers
    elif not config.get("use_sliding_window"):
        ranged = [False] * layers
    elif isinstance(config.get("layer_types"), list):
        ranged = [one == "sliding_attention" for one in config["layer_types"]]
    else:
        ranged = [number >= config.get("max_window_layers", 28) for number in range(layers)]
    if target.name == "deepseek":
        if any(ranged):
            raise Error(
                f"assemble: {target.name} looks at all tokens, and the base at {width}; set sliding_window to null in "
                "its config.json if it is used on shorter texts alone"
            )
        return {}
    if target.name == "mixtral":
        return {"sliding_window": width if any(ranged) else None}
    if target.name == "qwen3_moe" and len(set(ranged)) > 1:
        raise Error("assemble: in qwen3_moe all layers look equally far back, and in the base they do not")
    types = {"layer_types": ["sliding_attention" if one else "full_attention" for one in ranged]}
    own = {"sliding_window": width, "use_sliding_window": True} if any(ranged) else {"use_sliding_window": False}
    return own | (types if any(ranged) and target.name == "qwen2_moe" else {})
