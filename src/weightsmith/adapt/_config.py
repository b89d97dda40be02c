"""What ``adapter_config.json`` says, as far as it bears on weights; and writing one.

An adapter is only right together with its settings, so every setting is either understood, known to
matter in training alone, or refused by name.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import Error, FormatError
from weightsmith.weights import Weights
from weightsmith.weights._files import check_json, read_bytes

FILE = "adapter_config.json"

_LARGEST = 10_000_000
_METADATA = "lora_adapter_metadata"  # where some pipelines keep the same settings in the header

_UNDERSTOOD = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "ensure_weight_tying"),
    *("init_lora_weights", "base_model_name_or_path", "target_modules"),
)
"""Settings that are read here."""
_TRAINING_ONLY = (
    *("auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    "velora_config",  # another backward pass; the forward pass is that of LoRA
)
"""Settings that say nothing of what the tensors mean."""
_OTHER_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that take something out of the base weights before training."""


@dataclass(frozen=True)
class Config:
    """The settings of a LoRA adapter that decide what its tensors mean."""

    record: Mapping[str, Any]
    """All of them, as the file has them."""
    rank: int
    alpha: float
    stabilised: bool
    """Scaled by the root of the rank (rsLoRA)."""
    transposed: bool
    """Said to sit on weights ``[in, out]``."""
    magnitudes: bool
    """Directions and magnitudes apart (DoRA)."""
    ties: bool
    """Trained so that tied weights stay tied."""

    def rank_of(self, module: str) -> int:
        """The rank that the settings give to a module."""
        return int(_looked_up(self.record.get("rank_pattern"), module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the product of the two factors is multiplied by."""
        rank = self.rank_of(module)
        alpha = float(_looked_up(self.record.get("alpha_pattern"), module, self.alpha))
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def words(self, key: str) -> list[str]:
        """A setting that lists names; empty where there is none."""
        found = self.record.get(key)
        return [str(word) for word in found] if isinstance(found, list) else []


def _looked_up(patterns: object, module: str, default: float) -> float:
    """The first pattern that ends a module's name after a dot, as PEFT reads them."""
    for pattern, value in (patterns if isinstance(patterns, Mapping) else {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise FormatError(f"{FILE}: the pattern {pattern!r} is no regular expression: {error}") from None
    return default


def config_of(adapter: Weights, where: str) -> Config:
    """The settings beside an adapter, checked."""
    record = _record(adapter, where)
    kind = record.get("peft_type")
    if kind != "LORA":
        raise Error(f"{where}: peft_type is {kind!r} in {FILE}; only LORA can be read (with rsLoRA and DoRA)")
    for key, value in record.items():
        if key not in _UNDERSTOOD and key not in _TRAINING_ONLY and value not in (None, False, "", 0, [], {}):
            raise Error(
                f"{where}: {key} is {_short(value)} in {FILE}, which cannot be merged into weights or is unknown"
            )
    start = record.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        raise Error(
            f"{where}: init_lora_weights is {start!r} in {FILE}: it was trained on a base from which its start had "
            "been taken out. Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or "
            "take that base and set init_lora_weights to true"
        )
    rank, alpha = record.get("r", 8), record.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(f"{where}: r is {rank!r} and lora_alpha {alpha!r} in {FILE}; a count and a number are needed")
    return Config(
        record,
        rank,
        float(alpha),
        bool(record.get("use_rslora")),
        bool(record.get("fan_in_fan_out")),
        bool(record.get("use_dora")),
        bool(record.get("ensure_weight_tying")),
    )


def _record(adapter: Weights, where: str) -> dict[str, Any]:
    file = adapter.files.get(FILE)
    words = adapter.metadata.get(_METADATA)
    if file is None and words is None:
        raise Error(f"{where}: no {FILE} beside the tensors, so nobody can tell what they are multiplied by")
    if file is None:
        raw = str(words).encode()
    elif isinstance(file, bytes):
        raw = file
    else:
        if file.size > _LARGEST:
            raise FormatError(f"{where}: a {FILE} of {file.size:,} bytes is not believable")
        raw = read_bytes(file, 0, file.size)
    check_json(raw, FILE)
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: {FILE} is no JSON: {str(error)[:200]}") from None
    if not isinstance(record, dict):
        raise FormatError(f"{where}: {FILE} holds a {type(record).__name__}, not a table of settings")
    return record


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def written(
    ranks: Mapping[str, int], *, like: Mapping[str, Any] | None = None, **settings: Any
) -> tuple[dict[str, Any], bytes]:
    """An ``adapter_config.json`` for factors whose product is the change itself: scale 1 in every module.

    Args:
        ranks: module -> rank.
        like: settings of an adapter from which names that do not bear on weights are taken.
        settings: others, such as ``modules_to_save``.
    """
    usual = statistics.mode(ranks.values()) if ranks else 1
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    kept = ("task_type", "base_model_name_or_path", "auto_mapping", "revision")
    record = {
        "peft_type": "LORA",
        **{key: (like or {}).get(key) for key in kept},
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        **settings,
    }
    return record, (json.dumps(record, indent=2) + "\n").encode()
