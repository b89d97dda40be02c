"""Documents of ``mergekit-moe``, which say in YAML what becomes a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightsmith.errors import Error, did_you_mean
from weightsmith.merge._tokenizer import parsed
from weightsmith.merge.moe._assemble import assemble
from weightsmith.merge.moe._experts import Expert
from weightsmith.merge.moe._gates import BY_PROMPTS, GATES
from weightsmith.merge.moe._targets import TARGETS
from weightsmith.merge.room import Source
from weightsmith.weights import Weights, open

KEYS = ("base_model", "gate_mode", "dtype", "experts", "shared_experts", "experts_per_token", "architecture")
OUR_KEYS = ("seed", "layout", "vocabulary")
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "residual_scale", "noise_scale")

_ORDER = ("mixtral", "deepseek", "qwen2_moe", "qwen3_moe")
"""Where several architectures would do, the first of these is made, as mergekit does."""


def assemble_document(plain: Mapping[str, Any], resolve: Callable[[Any], Source] = lambda model: model) -> Weights:
    """The mixture of experts that a document of ``mergekit-moe`` asks for.

    Args:
        plain: the document as YAML gives it: ``base_model``, ``experts`` (each with ``source_model`` and
            ``positive_prompts``, and perhaps ``negative_prompts``, ``residual_scale`` and ``noise_scale``),
            ``gate_mode``, ``experts_per_token``, ``shared_experts``, ``architecture`` and ``dtype``; and of ours,
            ``seed``, ``layout`` and ``vocabulary``, as in `assemble`.
        resolve: from what the document calls a model to what `weightsmith.open` opens.

    Returns:
        Weights: of `assemble`. The vocabulary is the base's whatever the experts have, and without ``dtype`` all
        tensors are of the one that ``config.json`` of the base says.

    Raises:
        ValueError: a key that is unknown, lacking or of a wrong kind; or what `assemble` refuses.

    >>> assemble_document({"base_model": "folder", "expert": []})
    Traceback (most recent call last):
    ...
    weightsmith.errors.Error: a mixture of experts has no key 'expert' (did you mean 'experts'?)
    """
    _known(plain, (*KEYS, *OUR_KEYS), "a mixture of experts")
    if plain.get("base_model") is None:
        raise Error("a mixture of experts needs base_model:")
    opened: dict[str, Weights] = {}

    def model(called: Any) -> Weights:
        if repr(called) not in opened:
            opened[repr(called)] = open(resolve(called))
        return opened[repr(called)]

    experts = [_expert(one, f"experts[{number}]", model) for number, one in enumerate(_entries(plain, "experts"))]
    if not experts:
        raise Error("experts: must be a list with at least one entry")
    shared = [_expert(one, f"shared_experts[{n}]", model) for n, one in enumerate(_entries(plain, "shared_experts"))]
    if len(shared) > 1:
        raise Error(f"shared_experts: no architecture has more than one, got {len(shared)}")
    gate = plain.get("gate_mode", "hidden")
    if gate not in GATES:
        raise Error(f"gate_mode: must be one of {', '.join(GATES)}, got {gate!r}{did_you_mean(str(gate), GATES)}")
    per_token = plain.get("experts_per_token", 2)
    if not isinstance(per_token, int) or isinstance(per_token, bool):
        raise Error(f"experts_per_token: must be a whole number, got {per_token!r}")
    base = model(plain["base_model"])
    config = parsed(base.files, "config.json", "base_model")
    return assemble(
        experts,
        base,
        architecture=_architecture(plain.get("architecture"), config.get("model_type"), shared, gate),
        gate=gate,
        experts_per_token=per_token,
        shared=shared[0] if shared else None,
        dtype=plain.get("dtype") or config.get("dtype") or config.get("torch_dtype"),
        **{"vocabulary": "base", **{key: plain[key] for key in OUR_KEYS if key in plain}},
    )


def _known(entry: Any, keys: Sequence[str], what: str) -> None:
    if not isinstance(entry, Mapping):
        raise Error(f"{what} must be a mapping of names to values, got {entry!r:.80}")
    for key in entry:
        if key not in keys:
            raise Error(f"{what} has no key {key!r}{did_you_mean(str(key), keys)}")


def _entries(plain: Mapping[str, Any], key: str) -> Sequence[Any]:
    entries = plain.get(key) or []
    if not isinstance(entries, list | tuple):
        raise Error(f"{key}: must be a list, got {entries!r:.80}")
    return entries


def _expert(entry: Any, where: str, model: Callable[[Any], Weights]) -> Expert:
    _known(entry, EXPERT_KEYS, where)
    if entry.get("source_model") is None:
        raise Error(f"{where} needs source_model:")
    texts, numbers = {}, {}
    for key in ("positive_prompts", "negative_prompts"):
        texts[key] = entry.get(key) or []
        if not isinstance(texts[key], list | tuple) or not all(isinstance(one, str) for one in texts[key]):
            raise Error(f"{where}.{key}: must be a list of texts, got {texts[key]!r:.80}")
    for key, usual in (("residual_scale", 1.0), ("noise_scale", 0.0)):
        value = entry.get(key)
        numbers[key] = usual if value is None else value
        if isinstance(numbers[key], bool) or not isinstance(numbers[key], int | float):
            raise Error(f"{where}.{key}: must be a number, got {value!r:.80}")
    return Expert(model(entry["source_model"]), texts["positive_prompts"], texts["negative_prompts"], **numbers)


def _architecture(said: Any, kind: Any, shared: Sequence[Expert], gate: str) -> str | None:
    """Ours for what a document calls it (the beginning of a title will do), or what fits; None to be told what is."""
    targets = [TARGETS[name] for name in _ORDER]
    if said is not None:
        word = str(said).lower()
        targets = [t for t in targets if t.title.lower().startswith(word) or t.name == word]
        if not targets:
            titles = [TARGETS[name].title for name in _ORDER]
            raise Error(f"architecture: must be one of {', '.join(titles)}, got {said!r}")
    fitting = [t for t in targets if kind in t.takes and bool(shared) in t.with_shared]
    if shared and gate in BY_PROMPTS:  # a gate of its own needs prompts, and without one there is no use for them
        fitting = [t for t in fitting if bool(t.shared_gate) == bool(shared[0].prompts)] or fitting
    return fitting[0].name if fitting else targets[0].name if said is not None else None
