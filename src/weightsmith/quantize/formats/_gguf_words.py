"""The keys of a GGUF file: what a model is, and its tokenizer, from the files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from weightsmith.errors import Error
from weightsmith.weights._files import Bytes, content_of

Keys = list[list[Any]]
"""``[key, type, value]`` each."""

MODELS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "bert": "bert"}
"""``model_type`` of a config.json -> architecture of llama.cpp, for those that are written."""

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
    "MXFP4": 38,
}  # fmt: skip

# What splits text before pairs of bytes are merged. llama.cpp knows the patterns by a word.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _SPLIT.replace("DIGITS", "{1,3}"), "qwen2": _SPLIT.replace("DIGITS", "")}
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5


def model_keys(config: Mapping[str, Any], name: str, kind: str) -> Keys:
    """What a model is, from its config.json.

    Args:
        kind: how most of it is packed.
    """
    architecture = MODELS[config["model_type"]]
    try:
        own = _bert(config) if architecture == "bert" else _decoder(config)
        blocks, width = int(config["num_hidden_layers"]), int(config["hidden_size"])
        shared: Keys = [
            ["block_count", "uint32", blocks],
            ["context_length", "uint32", int(config["max_position_embeddings"])],
            ["embedding_length", "uint32", width],
            ["feed_forward_length", "uint32", int(config["intermediate_size"])],
            ["attention.head_count", "uint32", int(config["num_attention_heads"])],
            ["vocab_size", "uint32", int(config["vocab_size"])],
        ]
    except KeyError as error:
        raise Error(f"config.json does not say {error.args[0]}, which a GGUF file must") from None
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, Error):
            raise
        raise Error(f"config.json is not understood ({error}); put its numbers right") from None
    return [
        ["general.architecture", "string", architecture],
        ["general.type", "string", "model"],
        ["general.name", "string", name],
        ["general.file_type", "uint32", FILE_TYPES[kind]],
        ["general.quantization_version", "uint32", 2],
        *([f"{architecture}.{key}", type, value] for key, type, value in [*shared, *own]),
    ]


def _decoder(config: Mapping[str, Any]) -> Keys:
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys: Keys = [
        ["attention.head_count_kv", "uint32", int(config.get("num_key_value_heads") or heads)],
        ["attention.layer_norm_rms_epsilon", "float32", float(config["rms_norm_eps"])],
        ["attention.key_length", "uint32", width],
        ["attention.value_length", "uint32", width],
        ["rope.dimension_count", "uint32", width],
        ["rope.freq_base", "float32", float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)],
    ]
    if kind == "linear":
        return [
            *keys,
            ["rope.scaling.type", "string", "linear"],
            ["rope.scaling.factor", "float32", float(rope["factor"])],
        ]
    if kind not in ("default", None):
        raise Error(f"config.json scales positions by {kind!r}, which is not written to GGUF yet")
    if config.get("use_sliding_window") or (config["model_type"] == "mistral" and config.get("sliding_window")):
        raise Error("config.json has a sliding window of attention, which is not written to GGUF yet")
    return keys


def _bert(config: Mapping[str, Any]) -> Keys:
    if (
        config.get("hidden_act") not in ("gelu", None)
        or config.get("position_embedding_type", "absolute") != "absolute"
    ):
        raise Error("llama.cpp runs BERT with gelu and absolute positions only")
    return [
        ["attention.layer_norm_epsilon", "float32", float(config["layer_norm_eps"])],
        ["attention.causal", "bool", False],
        ["pooling_type", "uint32", 1],  # the mean
    ]


# The tokenizer


def tokenizer_keys(files: Mapping[str, bytes | Bytes], config: Mapping[str, Any], split: str | None = None) -> Keys:
    """The vocabulary and how text becomes it, from tokenizer.json; a model without one runs on numbers alone.

    Args:
        split: llama.cpp's word for how text is split, of a tokenizer that we do not know; None to find it.

    Raises:
        Error: a tokenizer that llama.cpp does not have.
    """
    if "tokenizer.json" not in files:
        return [["tokenizer.ggml.model", "string", "no_vocab"]]
    try:
        made = json.loads(content_of(files["tokenizer.json"]))
        said = json.loads(content_of(files["tokenizer_config.json"])) if "tokenizer_config.json" in files else {}
        model = made["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
        if kind == "WordPiece":
            keys = _pieces(made, config)
        elif kind == "BPE" and "ByteLevel" in json.dumps(made.get("pre_tokenizer")):
            keys = _pairs(made, said, config, split or split_word(made))
        else:
            raise Error(
                f"its tokenizer is {kind}, of a kind that is not written to GGUF; leave it out with tokenizer=False"
            )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, Error):
            raise
        raise Error(f"tokenizer.json is not understood ({error}); leave it out with tokenizer=False") from None
    template = said.get("chat_template")
    if "chat_template.jinja" in files:
        template = content_of(files["chat_template.jinja"]).decode()
    return [*keys, *([["tokenizer.chat_template", "string", template]] if isinstance(template, str) else [])]


def _vocabulary(made: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and of what kind it is."""
    tokens = {number: token for token, number in made["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for added in made.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER
    count = max(size, max(tokens) + 1)
    if count > size:
        raise Error(f"the tokenizer has {count} tokens and the model {size}")
    return [tokens.get(i, f"[PAD{i}]") for i in range(count)], [kinds.get(i, UNUSED) for i in range(count)]


def _pairs(made: Mapping[str, Any], said: Mapping[str, Any], config: Mapping[str, Any], split: str) -> Keys:
    tokens, kinds = _vocabulary(made, int(config["vocab_size"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in made["model"]["merges"]]
    keys: Keys = [
        ["tokenizer.ggml.model", "string", "gpt2"],
        ["tokenizer.ggml.pre", "string", split],
        ["tokenizer.ggml.tokens", "[string]", tokens],
        ["tokenizer.ggml.token_type", "[int32]", kinds],
        ["tokenizer.ggml.merges", "[string]", merges],
        ["tokenizer.ggml.add_bos_token", "bool", bool(said.get("add_bos_token", _begins(made)))],
    ]
    for word, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = config.get(f"{word}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            keys.append([f"tokenizer.ggml.{key}_token_id", "uint32", number])
    return keys


def _begins(made: Mapping[str, Any]) -> bool:
    """Whether texts are given a first token."""
    processor = made.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    single = next((step["single"] for step in steps if step.get("type") == "TemplateProcessing"), [])
    return bool(single) and "SpecialToken" in single[0]


def split_word(made: Mapping[str, Any]) -> str:
    """llama.cpp's word for how text is split before pairs are merged.

    The words stand for more than a pattern: none of them changes the text or puts a space before it, and
    ``llama-bpe`` alone takes pieces that are tokens whole.
    """
    splitting = made["pre_tokenizer"]
    steps = splitting.get("pretokenizers", [splitting])
    kinds = [step["type"] for step in steps]
    whole = bool(made["model"].get("ignore_merges"))
    changed = (made.get("normalizer") or {}).get("type", "NFC") != "NFC" or any(
        s.get("add_prefix_space") for s in steps
    )
    own = steps[-1].get("use_regex", True)
    if not changed and kinds == ["ByteLevel"] and own and not whole:
        return "gpt-2"
    if not changed and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and own and not whole:
        return "smollm"
    if not changed and kinds == ["Split", "ByteLevel"] and not own:
        pattern = steps[0].get("pattern", {}).get("Regex")
        for word, known in _SPLITS.items():
            if pattern == known and whole == (word == "llama-bpe"):
                return word
    raise Error(
        f"its tokenizer splits text by {' and '.join(kinds)} in a way that is not known to be llama.cpp's; say which "
        'with keys={"tokenizer.ggml.pre": ...}, or leave the tokenizer out with tokenizer=False'
    )


def _pieces(made: Mapping[str, Any], config: Mapping[str, Any]) -> Keys:
    tokens, kinds = _vocabulary(made, int(config["vocab_size"]))
    numbers = {token: number for number, token in enumerate(tokens)}
    # llama.cpp marks beginnings of words, not their continuations.
    marked = [
        token if kind == CONTROL else token[2:] if token.startswith("##") else "\u2581" + token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    keys: Keys = [
        ["tokenizer.ggml.model", "string", "bert"],
        ["tokenizer.ggml.pre", "string", "default"],
        ["tokenizer.ggml.tokens", "[string]", marked],
        ["tokenizer.ggml.token_type", "[int32]", kinds],
        ["tokenizer.ggml.token_type_count", "uint32", int(config.get("type_vocab_size", 1))],
    ]
    words = (("unknown", "[UNK]"), ("seperator", "[SEP]"), ("padding", "[PAD]"), ("cls", "[CLS]"), ("mask", "[MASK]"))
    for key, token in words:
        if token in numbers:
            keys.append([f"tokenizer.ggml.{key}_token_id", "uint32", numbers[token]])
    return keys
