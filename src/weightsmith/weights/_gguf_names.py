"""What families of models call their tensors in GGUF and in Hugging Face checkpoints, and what differs in the values.

A family is a row of data: the names that differ from the usual decoder's, and the changes that
converters make on the way into GGUF, which are to be undone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Change = Literal[
    "heads", "heads_kv", "minus_one", "transpose", "interleave", "middle_axis", "first_axis", "log_negative"
]
"""How GGUF values become a checkpoint's:

heads, heads_kv: rows of a head are in pairs for the rotary embedding; back to two halves.
minus_one: norms that multiply by ``1 + weight`` are stored with the one added.
transpose: a layer that keeps its matrix as [in, out].
interleave: queries, keys and values of all heads one after another; back to head by head.
middle_axis: ``[channels, kernel]`` of a depthwise convolution; back to ``[channels, 1, kernel]``.
first_axis: a matrix of one row, stored as a vector.
log_negative: stored as ``-exp(x)``; back to ``x``.
"""


@dataclass(frozen=True)
class Family:
    """Names and changes of one architecture.

    Attributes:
        names: GGUF stem -> checkpoint stem; ``{}`` stands for the number of the block.
        experts: GGUF stem of the stacked experts -> checkpoint stem, with a second ``{}`` for the expert.
        changes: pattern of the whole GGUF name (``#`` for the number) -> change.
        head: the checkpoint's output layer, which shares the embedding when the file has none.
    """

    names: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    head: str = "lm_head.weight"


def _blocks(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"blk.{{}}.{ours}": f"{prefix}.{{}}.{theirs}" for ours, theirs in names.items()}


_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
_ATTENTION_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_UNGATED = {name: _MLP[name] for name in ("ffn_up", "ffn_down")}
_USUAL = _ATTENTION | _NORMS | _MLP


def _decoder(*parts: Mapping[str, str]) -> dict[str, str]:
    merged = {ours: theirs for part in parts for ours, theirs in part.items()}
    return _ENDS | _blocks("model.layers", merged)


def _experts(prefix: str, gate: str, up: str, down: str) -> dict[str, str]:
    names = {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down}
    return _blocks("model.layers", {ours: f"{prefix}.{{}}.{theirs}" for ours, theirs in names.items()})


_ROTARY: dict[str, Change] = {"blk.#.attn_q.*": "heads", "blk.#.attn_k.*": "heads_kv"}
_ONE_PLUS: dict[str, Change] = {"*norm.weight": "minus_one"}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SPLIT_EXPERTS = _experts("mlp.experts", "gate_proj", "up_proj", "down_proj")
_SHARED_EXPERT = {f"{ours}_shexp": f"mlp.shared_expert.{theirs[4:]}" for ours, theirs in _MLP.items()}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        _decoder(_USUAL, {"ffn_gate_inp": "block_sparse_moe.gate"}),
        _experts("block_sparse_moe.experts", "w1", "w3", "w2"),
        _ROTARY,
    ),
    "qwen2": Family(_decoder(_USUAL)),
    "qwen2moe": Family(
        _decoder(
            _ATTENTION,
            _NORMS,
            {"ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
            _SHARED_EXPERT,
        ),
        _SPLIT_EXPERTS,
        {"blk.#.ffn_gate_inp_shexp.weight": "first_axis"},
    ),
    "qwen3": Family(_decoder(_USUAL, _ATTENTION_NORMS)),
    "qwen3moe": Family(_decoder(_ATTENTION, _ATTENTION_NORMS, _NORMS, {"ffn_gate_inp": "mlp.gate"}), _SPLIT_EXPERTS),
    "gemma": Family(_decoder(_USUAL), changes=_ONE_PLUS),
    "gemma2": Family(_decoder(_ATTENTION, _MLP, _SANDWICH), changes=_ONE_PLUS),
    "gemma3": Family(_decoder(_ATTENTION, _ATTENTION_NORMS, _MLP, _SANDWICH), changes=_ONE_PLUS),
    "phi2": Family(
        _ENDS
        | {"output_norm": "model.final_layernorm"}
        | _blocks(
            "model.layers",
            _ATTENTION
            | {"attn_output": "self_attn.dense", "attn_norm": "input_layernorm"}
            | {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
        )
    ),
    "phi3": Family(
        _decoder(
            _NORMS,
            {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"},
            {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        )
    ),
    "starcoder2": Family(_decoder(_ATTENTION, _NORMS, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})),
    "stablelm": Family(_decoder(_USUAL)),
    "nemotron": Family(_decoder(_ATTENTION, _NORMS, _UNGATED), changes=_ONE_PLUS),
    "olmo2": Family(
        _decoder(
            _ATTENTION,
            _ATTENTION_NORMS,
            _MLP,
            {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
        )
    ),
    "command-r": Family(_decoder(_ATTENTION, _ATTENTION_NORMS, _MLP, {"attn_norm": "input_layernorm"})),
    "gpt2": Family(
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        }
        | _blocks(
            "transformer.h",
            {
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
        ),
        changes=dict.fromkeys(
            (f"blk.#.{x}.weight" for x in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")), "transpose"
        ),
    ),
    "bloom": Family(
        {
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        }
        | _blocks(
            "transformer.h",
            {
                "attn_norm": "input_layernorm",
                "attn_qkv": "self_attention.query_key_value",
                "attn_output": "self_attention.dense",
                "ffn_norm": "post_attention_layernorm",
                "ffn_up": "mlp.dense_h_to_4h",
                "ffn_down": "mlp.dense_4h_to_h",
            },
        ),
        changes={"blk.#.attn_qkv.*": "interleave"},
    ),
    "mamba": Family(
        {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
        | _blocks(
            "backbone.layers",
            {
                "attn_norm": "norm",
                "ssm_in": "mixer.in_proj",
                "ssm_conv1d": "mixer.conv1d",
                "ssm_x": "mixer.x_proj",
                "ssm_dt": "mixer.dt_proj",
                "ssm_a": "mixer.A_log",
                "ssm_d": "mixer.D",
                "ssm_out": "mixer.out_proj",
            },
        ),
        changes={"blk.#.ssm_conv1d.weight": "middle_axis", "blk.#.ssm_a": "log_negative"},
    ),
    "bert": Family(
        {
            "token_embd": "embeddings.word_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        }
        | _blocks(
            "encoder.layer",
            {
                "attn_q": "attention.self.query",
                "attn_k": "attention.self.key",
                "attn_v": "attention.self.value",
                "attn_output": "attention.output.dense",
                "attn_output_norm": "attention.output.LayerNorm",
                "ffn_up": "intermediate.dense",
                "ffn_down": "output.dense",
                "layer_output_norm": "output.LayerNorm",
            },
        ),
        head="",
    ),
}
"""GGUF architecture -> family."""

COMPUTED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors of GGUF that a checkpoint does not have: they follow from its configuration."""

_BLOCK = re.compile(r"^blk\.(\d{1,6})\.")


def renamed(family: Family, name: str) -> tuple[str | None, bool]:
    """The checkpoint's name for a GGUF name (None if it has none), and whether experts are stacked in it.

    The name of stacked experts has a ``{}`` for the number of the expert.

    >>> renamed(FAMILIES["llama"], "blk.7.attn_q.weight")
    ('model.layers.7.self_attn.q_proj.weight', False)
    >>> renamed(FAMILIES["llama"], "blk.7.ffn_up_exps.weight")
    ('model.layers.7.block_sparse_moe.experts.{}.w3.weight', True)
    """
    stem, suffix = name, ""
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            stem, suffix = name.removesuffix(ending), ending
    found = _BLOCK.match(stem)
    block = found[1] if found else ""
    general = _BLOCK.sub("blk.{}.", stem)
    if general in family.experts and suffix:
        return family.experts[general].format(block, "{}") + suffix, True
    if general in family.names:
        return family.names[general].format(block) + suffix, False
    return None, False


def change_of(family: Family, name: str) -> Change | None:
    """What is to be undone in the values of a GGUF tensor.

    >>> change_of(FAMILIES["llama"], "blk.7.attn_k.weight"), change_of(FAMILIES["qwen2"], "blk.7.attn_k.weight")
    ('heads_kv', None)
    """
    general = _BLOCK.sub("blk.#.", name)
    for pattern, change in family.changes.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), general):
            return change
    return None
