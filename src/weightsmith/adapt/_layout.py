"""How a model's tensors lie: which way round, under which names, and what its config.json says of that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from weightsmith.weights import Weights
from weightsmith.weights._files import content_of

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
_HEAD = "lm_head.weight"
_TIES = "tie_word_embeddings"
_LOOKUP = re.compile(r"(embed|wte|wpe|shared)[^.]*\.weight$", re.IGNORECASE)


def is_embedding(name: str) -> bool:
    """Whether a weight is looked up row by row, by its name."""
    return bool(_LOOKUP.search(name))


def implied(name: str, base: Weights) -> str | None:
    """The embedding that a head is, where the model has but one tensor for both."""
    if name in base or not name.endswith(_HEAD) or not _says_tied(base):
        return None
    found = [one for one in base if _EMBEDDING.search(one)]
    return found[0] if len(found) == 1 else None


def _says_tied(base: Weights) -> bool:
    """Whether config.json leaves the head to the embedding, in a model that has no head of its own."""
    config = _config(base)
    text = config.get("text_config")
    word = config.get(_TIES, text.get(_TIES) if isinstance(text, dict) else None)
    return bool(config) and word is not False and not any(name.endswith(_HEAD) for name in base)


def _config(base: Weights) -> dict[str, Any]:
    file = base.files.get("config.json")
    if file is None:
        return {}
    try:
        config = json.loads(content_of(file))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def ways_round(base: Weights) -> dict[str, bool]:
    """Weight, or layer (``"model.layers.3."``), -> whether it is stored ``[in, out]``, as far as biases tell."""
    ways: dict[str, bool] = {}
    for bias in base:
        weight = bias.removesuffix("bias") + "weight"
        if bias.endswith(".bias") and weight in base:
            shape, length = base.spec(weight).shape, base.spec(bias).shape
            if len(shape) == 2 and shape[0] != shape[1] and length in (shape[:1], shape[1:]):
                ways[weight] = length == shape[1:]
                ways.setdefault(_layer(weight), ways[weight])
    ways.pop("", None)
    return ways


def way_round(name: str, ways: Mapping[str, bool]) -> bool | None:
    """Whether a weight is stored ``[in, out]``, by its own bias or those around it; None if none tells."""
    return ways.get(name, ways.get(_layer(name)))


def _layer(name: str) -> str:
    found = re.match(r".*\.\d+\.", name)
    return found[0] if found else ""


def names_by_tensor(base: Weights) -> dict[int, list[str]]:
    """Every tensor's names, by the identity of its node."""
    names: dict[int, list[str]] = {}
    for name in base:
        names.setdefault(id(base.node(name)), []).append(name)
    return names


def names_of(name: str, base: Weights, tensors: Mapping[int, list[str]]) -> list[str]:
    """All names of one tensor, those included that config.json implies."""
    embedding = implied(name, base)
    if embedding is not None:
        return [embedding, name]
    same = tensors[id(base.node(name))]
    if len(same) == 1 and _EMBEDDING.search(name) and _says_tied(base):
        return [name, _HEAD]
    return same


def untied_files(base: Weights) -> dict[str, bytes]:
    """A config.json for two tensors where there was one."""
    config = _config(base)
    text = config.get("text_config")
    if isinstance(text, dict) and _TIES in text:
        config["text_config"] = text | {_TIES: False}
    return {"config.json": (json.dumps(config | {_TIES: False}, indent=2) + "\n").encode()} if config else {}


def settings_of(base: Weights) -> dict[str, Any]:
    """What an adapter's settings say of its base."""
    config = _config(base)
    words = [str(word) for word in config.get("architectures") or ()]
    causal = any(word.endswith(("ForCausalLM", "LMHeadModel")) for word in words)
    named = {"base_model_name_or_path": config["_name_or_path"]} if config.get("_name_or_path") else {}
    return named | ({"task_type": "CAUSAL_LM"} if causal else {})
