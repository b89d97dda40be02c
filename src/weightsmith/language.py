"""Causal language models of transformers, made from `Weights`, and texts cut into windows for them.

Nothing is fetched: the model is built from the ``config.json`` and the tokenizer that weights carry.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.errors import Error, listed, missing, told

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weightsmith.weights import Weights

LENGTH = 256
"""Tokens of a window, where nothing is said."""

NEEDS = "a causal language model, which predicts the next token"

_CARRIED = (".json", ".txt", ".model", ".jinja")
_NOT_CARRIED = ("README", "LICENSE", "NOTICE")


def carried(weights: Weights) -> dict[str, bytes]:
    """Config and tokenizer, by name."""
    from weightsmith.weights._files import content_of

    files = {
        name: content_of(data)
        for name, data in weights.files.items()
        if "/" not in name and name.endswith(_CARRIED) and not name.startswith(_NOT_CARRIED)
    }
    if "config.json" not in files:
        raise Error(
            "a language model is built from the config.json beside its weights, and these carry none; "
            "open the folder that save_pretrained wrote, or one that weightsmith convert makes of a GGUF file"
        )
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "merges")) for name in files):
        raise Error("a text needs the tokenizer beside the weights, and these carry none; "
                    "put its files (tokenizer.json, tokenizer_config.json) into the folder")  # fmt: skip
    return files


def built(weights: Weights, files: Mapping[str, bytes], dtype: Any) -> tuple[Any, Any]:
    """The model with these weights, and its tokenizer."""
    config, tokenizer = described(files)
    return with_weights(config, weights, dtype), tokenizer


def described(files: Mapping[str, bytes]) -> tuple[Any, Any]:
    """The config of a model that predicts the next token, and its tokenizer."""
    config, tokenizer = config_and_tokenizer(files, _check_causal)
    return config, tokenizer


def config_and_tokenizer(
    files: Mapping[str, bytes], check: Callable[[Any], None] = lambda config: None
) -> tuple[Any, Any]:
    """The config and the tokenizer in some files, by transformers."""
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(folder, **local)
        except Exception as error:  # transformers raises whatever comes
            raise Error(f"transformers cannot use the config.json of these weights: {told(error)}") from error
        check(config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:
            raise Error(f"transformers cannot use the tokenizer beside these weights: {told(error)}") from error
    return config, tokenizer


def _check_causal(config: Any) -> None:
    """An error unless the model predicts the next token of a text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind, needs = config.model_type, f"a text needs {NEEDS}"
    if getattr(config, "is_encoder_decoder", False):
        raise Error(f"{needs}; {kind} translates one sequence into another")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Error(f"{needs}; transformers knows none of the type {kind}")
    # Encoders may be used as decoders, but only with weights trained for that, and then their config says so.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise Error(f"{needs}; {kind} is an encoder, which fills in words that are masked")  # fmt: skip


def whole(weights: Any, dtype: Any = None, device: Any = None) -> nn.Module:
    """The model that predicts the next token, in evaluation mode; float32 and on the CPU by default.

    Raises:
        Error: no config or tokenizer beside the weights, or a model that predicts no next token.
    """
    import torch

    from weightsmith.weights import as_dtype, open

    opened = open(weights)
    config, _ = described(carried(opened))
    return with_weights(config, opened, as_dtype(dtype or torch.float32)).eval().to(device)


def with_weights(config: Any, weights: Weights, dtype: Any, kind: Any = None) -> Any:
    """The model as transformers loads it, so that renamed and fused tensors come to their places.

    Args:
        kind: its class; by default the causal language model of the config.
    """
    from transformers import __version__
    from transformers.utils import logging

    if getattr(config, "quantization_config", None):
        raise Error("a text takes float weights, and these are quantized; see weightsmith.quantize.dequantize")
    # Copies: what transformers is handed it may keep, and other weights are copied into the model later.
    made: dict[int, Any] = {}
    for name in weights:
        if id(weights.node(name)) not in made:
            value = weights[name].detach()
            made[id(weights.node(name))] = value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
    state = {name: made[id(weights.node(name))] for name in weights}
    word = "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
    bars = getattr(logging, "is_progress_bar_enabled", lambda: False)()
    logging.disable_progress_bar()
    try:
        model, loading = (kind or _causal(config)).from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **{word: dtype}
        )
    except Exception as error:
        raise Error(f"transformers cannot load these weights into {config.model_type}: {told(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for key, what in (("missing_keys", "lack"), ("unexpected_keys", "have beside what it needs")):
        if loading.get(key):
            raise Error(f"these weights do not fit {type(model).__name__}: they {what} {listed(sorted(loading[key]))}")
    return model


def given(model: Any, weights: Weights) -> bool:
    """Copy the weights into a model that is there, if they have its names and shapes."""
    own = model.state_dict(keep_vars=True)
    there = {tensor.data_ptr() for name, tensor in own.items() if name in weights}
    fits = all(name in own and tuple(own[name].shape) == weights.spec(name).shape for name in weights)
    if not fits or any(name not in weights and tensor.data_ptr() not in there for name, tensor in own.items()):
        return False
    weights.load_into(model)
    return True


@dataclass(frozen=True)
class Windows:
    """Parts of a text as tokens."""

    tokens: tuple[tuple[int, ...], ...]
    front: int
    """Tokens at the start of every window that are not of the text."""
    spans: tuple[int, ...]
    """The bytes (UTF-8) of what is predicted in each window."""

    @property
    def before(self) -> int:
        """Where the predicted tokens begin: the first token of a text has none before it to be told from."""
        return max(self.front, 1)

    @property
    def predicted(self) -> tuple[int, ...]:
        """Tokens that are predicted in each window."""
        return tuple(len(window) - self.before for window in self.tokens)


def read_text(path: str | os.PathLike[str]) -> str:
    """A text that is there and says something."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"{file}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise Error(f"{file}: is empty, so it says nothing of a model")
    return text


def check(where: str, length: int | None, windows: int | None, device: str) -> None:
    """An error for options that will not do, before anything is read."""
    import importlib.util

    for name, value, least in (("length", length, 2), ("windows", windows, 1)):
        if value is not None and value < least:
            raise Error(f"{where}: {name} must be at least {least}, got {value}")
    if importlib.util.find_spec("transformers") is None:
        raise missing("transformers", "hf", f"{where}:")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Error(f"{where}: cannot compute on device={device}: {str(error).splitlines()[0]}") from None


def cut(text: str, tokenizer: Any, model: Any, length: int | None, windows: int | None, where: str) -> Windows:
    """Windows of tokens, evenly spread over the text.

    Args:
        length: of a window, what comes before the text included; None for `LENGTH`, or what the model takes.
        windows: how many; None for the whole text.
        where: whose text it is, for messages.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length or LENGTH
    if length is not None and length > most:
        raise Error(f"{where}: length={length}, but the model takes {most} tokens at most")
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    tokens = found["input_ids"]
    front = _front(tokenizer)
    body = min(length or LENGTH, most) - len(front)
    if not tokens or len(tokens) + len(front) < 2 or body < 1:
        raise Error(f"{where}: {len(tokens)} tokens are too few for a window")
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokens) >= rows:
        raise Error(f"the tokenizer gives the token {max(tokens)}, but the model has embeddings for {rows} only")
    whole = max(len(tokens) // body, 1)
    count = min(windows or whole, whole)
    starts = [(2 * number + 1) * whole // (2 * count) * body for number in range(count)]
    parts = [(start, min(start + body, len(tokens))) for start in starts]
    skipped = 0 if front else 1
    spans = [_bytes_of(text, tokenizer, found, start + skipped, stop) for start, stop in parts]
    cut = tuple((*front, *tokens[start:stop]) for start, stop in parts)
    return Windows(cut, len(front), tuple(spans))


def _bytes_of(text: str, tokenizer: Any, found: Any, start: int, stop: int) -> int:
    if start >= stop:
        return 0
    places = found.get("offset_mapping")
    if places:
        return len(text[places[start][0] : places[stop - 1][1]].encode())
    return len(tokenizer.decode(found["input_ids"][start:stop], clean_up_tokenization_spaces=False).encode())


def _front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    return next((dressed[:at] for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), [])


ROWS = 256
"""Positions whose logits are looked at together: a large vocabulary in float32 fills the memory else."""


def predictions(model: Any, window: tuple[int, ...], before: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits ``[rows, vocabulary]``, float32, and the tokens ``[rows]`` that come, some positions at a time."""
    import torch

    with torch.no_grad():
        tokens = torch.tensor(window, device=next(model.parameters()).device)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, before - 1 : -1]
        for some, truth in zip(logits.split(ROWS), tokens[before:].split(ROWS), strict=True):
            yield some.float(), truth


def without_weights(files: Mapping[str, bytes]) -> tuple[Any, Any]:
    """The model that a config describes, on the meta device, and its tokenizer: enough to cut a text."""
    import torch

    config, tokenizer = described(files)
    with torch.device("meta"):
        return _causal(config)(config), tokenizer


def _causal(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def classifier(weights: Weights, dtype: Any) -> tuple[Any, Any]:
    """A classifier of texts, made from what weights carry, and its tokenizer.

    Raises:
        Error: the config is of no classifier of texts.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KINDS

    config, tokenizer = config_and_tokenizer(carried(weights))
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    if type(config) not in KINDS or "ForSequenceClassification" not in named:
        raise Error(
            f"a text with a label needs a classifier of texts, and these weights are of {named or config.model_type}; "
            "give a module of your own"
        )
    kind: Any = KINDS[type(config)]
    return with_weights(config, weights, dtype, kind[0] if isinstance(kind, tuple) else kind), tokenizer
