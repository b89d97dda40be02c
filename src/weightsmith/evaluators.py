"""How good are these weights? A function to ask, from a word that a command line or a recipe can hold.

Methods that search (`merge.greedy_soup`, `average.lcsc`) need a function ``weights -> quality``. `evaluator`
makes one of a spec: a function in a Python file of one's own, or the likelihood of a held-out text under a
language model. Nothing is ever fetched from a network.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from weightsmith.errors import Error, did_you_mean, listed, missing

if TYPE_CHECKING:
    from weightsmith.weights import Weights

Evaluate = Callable[["Weights"], float]
"""Quality on held-out data; higher is better."""

LENGTH = 256
"""Tokens of a window, where nothing is said."""

FORMS = "path/to/file.py:function, or text:held_out.txt"
"""What a spec may look like, for messages."""


def evaluator(spec: str) -> Evaluate:
    """The function that a spec names.

    ``path/to/file.py:function``
        A function of your own, ``function(weights) -> number``, higher being better. The file is run once. Give it
        whatever it needs (data, a model to load the weights into) in the file. A number that is NaN is an error;
        minus infinity says that nothing could be worse.

    ``text:held_out.txt?length=256&windows=16``
        Minus the mean nats per token of a text under a Hugging Face causal language model: ``-log(perplexity)``.
        The model is built from the ``config.json`` and the tokenizer that the weights carry, once, and is then given
        the weights of every call. The text is cut into windows of ``length`` tokens (256, or what the model takes),
        of which ``windows`` (16), evenly spread, are read, each on its own; a first token such as ``<s>`` is put
        before each where the tokenizer has one. ``device=cuda`` and ``dtype=bfloat16`` say where and in what to
        compute (the CPU, float32). Weights that give no number (NaN) count as minus infinity.

    Raises:
        ValueError: no such form, file, function or option, at once; and when it is called, whatever is wrong
            with the function or with a model that is no causal language model.
        MissingPackage: ``text:`` without transformers.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "mine.py")
    >>> _ = file.write_text("def small(weights): return -sum(float(w.norm()) for w in weights.values())")
    >>> evaluator(f"{file}:small")(Weights.of({"w": torch.tensor([3.0, 4.0])}))
    -5.0
    """
    kind, _, rest = spec.partition(":")
    if kind == "text":
        path, _, query = rest.partition("?")
        return text_evaluator(path, **_text_options(query, spec))
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise Error(f"{spec!r} is no evaluator; write {FORMS}")
    return function_evaluator(path, name)


# A function of one's own


def function_evaluator(path: str | os.PathLike[str], name: str) -> Evaluate:
    """The function of a Python file, checked: it returns a number or says what went wrong."""
    file = Path(path)
    if not file.is_file():
        near = os.listdir(file.parent) if file.parent.is_dir() else []
        raise Error(f"{file}: no such file{did_you_mean(file.name, near)}; an evaluator is {FORMS}")
    names = _run(file)
    function = names.get(name)
    if not callable(function):
        own = [word for word, value in names.items() if getattr(value, "__module__", None) == names["__name__"]]
        raise Error(f"{file}: has no function {name!r}{did_you_mean(name, own)}; it has {listed(own) or 'none'}")

    def evaluate(weights: Weights) -> float:
        try:
            found = function(weights)
        except Exception as error:
            raise Error(f"{file}:{name} failed{_where(error, file)}: {_told(error)}") from error
        return _number(found, f"{file}:{name}")

    return evaluate


def from_file(spec: str) -> Any:
    """What ``path/to/file.py:name`` stands for: a value of a Python file, or what a function of it returns.

    Raises:
        ValueError: no such file or name, or the function fails.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "mine.py")
    >>> _ = file.write_text("rates = [1, 2]\\ndef batches(): return iter(rates)")
    >>> from_file(f"{file}:rates"), list(from_file(f"{file}:batches"))
    ([1, 2], [1, 2])
    """
    path, colon, name = spec.rpartition(":")
    file = Path(path)
    if not colon or not path.endswith(".py"):
        raise Error(f"{spec!r} names nothing in a Python file; write path/to/file.py:name")
    if not file.is_file():
        raise Error(
            f"{file}: no such file{did_you_mean(file.name, os.listdir(file.parent) if file.parent.is_dir() else [])}"
        )
    known = _run(file)
    if name not in known:
        raise Error(f"{file}: has no {name!r}{did_you_mean(name, known)}")
    value = known[name]
    if not inspect.isfunction(value):
        return value
    try:
        return value()
    except Exception as error:
        raise Error(f"{file}:{name} failed{_where(error, file)}: {_told(error)}") from error


def _run(file: Path) -> dict[str, Any]:
    """The names that a Python file defines."""
    spec = importlib.util.spec_from_file_location(f"weightsmith_evaluator_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise Error(f"{file}: cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # for what lies beside it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Error(f"{file}:{error.lineno}: {error.msg}") from None
    except Exception as error:
        raise Error(f"{file}: failed{_where(error, file)} when it was read: {_told(error)}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return vars(module)


def _where(error: BaseException, file: Path) -> str:
    """The last line of the file that an error went through."""
    frames, here = traceback.extract_tb(error.__traceback__), file.resolve()
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == here]
    return f" at line {lines[-1]}" if lines else ""


def _told(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _number(found: Any, who: str) -> float:
    """What a function returned, as a float."""
    try:
        if found is None or isinstance(found, str | bytes | bool):
            raise TypeError
        number = float(found)
    except (TypeError, ValueError, RuntimeError):
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise Error(f"{who} must return one number, higher being better; it returned {shown}") from None
    if math.isnan(number):
        raise Error(f"{who} returned NaN, which no order knows; return float('-inf') for weights that are of no use")
    return number


# The likelihood of a text


@dataclass(frozen=True)
class _Reader:
    """A causal language model, and the windows of the text as its tokenizer cuts it."""

    model: Any
    windows: list[list[int]]
    front: int
    """Tokens at the start of every window that are not of the text."""


def text_evaluator(
    path: str | os.PathLike[str],
    *,
    length: int | None = None,
    windows: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
) -> Evaluate:
    """Minus the mean nats per token of a text; see `evaluator`."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"{file}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise Error(f"{file}: is empty, so it says nothing of a model")
    for name, value, least in (("length", length, 2), ("windows", windows, 1)):
        if value is not None and value < least:
            raise Error(f"text:{file}: {name} must be at least {least}, got {value}")
    if importlib.util.find_spec("transformers") is None:
        raise missing("transformers", "hf", "the evaluator text:")
    import torch

    from weightsmith.weights import as_dtype

    floats = as_dtype(dtype)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Error(f"text:{file}: cannot compute on device={device}: {str(error).splitlines()[0]}") from None
    latest: list[tuple[dict[str, bytes], _Reader]] = []

    def evaluate(weights: Weights) -> float:
        files = _carried(weights)
        if not (latest and latest[0][0] == files and _given(latest[0][1].model, weights)):
            latest.clear()  # before the next one needs the memory
            model, tokenizer = _built(weights, files, floats)
            cut, front = _cut(text, tokenizer, model, length, windows, file)
            latest.append((files, _Reader(model.to(device).eval(), cut, front)))
        return _likelihood(latest[0][1])

    return evaluate


def _text_options(query: str, spec: str) -> dict[str, Any]:
    """``length=256&windows=16`` as keyword arguments."""
    known = ("length", "windows", "device", "dtype")
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise Error(f"{spec}: no option {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
        if name in ("length", "windows"):
            if not value.isdecimal():
                raise Error(
                    f"{spec}: {name} is a number of {'tokens' if name == 'length' else 'windows'}, got {value!r}"
                )
            options[name] = int(value)
        else:
            options[name] = value
    return options


_CARRIED = (".json", ".txt", ".model", ".jinja")
_NOT_CARRIED = ("README", "LICENSE", "NOTICE")


def _carried(weights: Weights) -> dict[str, bytes]:
    """Config and tokenizer, by name."""
    from weightsmith.weights._files import read_bytes

    files = {
        name: data if isinstance(data, bytes) else read_bytes(data, 0, data.size)
        for name, data in weights.files.items()
        if "/" not in name and name.endswith(_CARRIED) and not name.startswith(_NOT_CARRIED)
    }
    if "config.json" not in files:
        raise Error(
            "the evaluator text: builds the model from the config.json beside the weights, and these carry none; "
            "open the folder that save_pretrained wrote"
        )
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "merges")) for name in files):
        raise Error("the evaluator text: needs the tokenizer beside the weights, and these carry none; "
                    "put its files (tokenizer.json, tokenizer_config.json) into the folder")  # fmt: skip
    return files


def _built(weights: Weights, files: Mapping[str, bytes], dtype: Any) -> tuple[Any, Any]:
    """The model with these weights, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(folder, **local)
        except Exception as error:  # transformers raises whatever comes
            raise Error(f"transformers cannot use the config.json of these weights: {_told(error)}") from error
        _check_causal(config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        except Exception as error:
            raise Error(f"transformers cannot use the tokenizer beside these weights: {_told(error)}") from error
    return _with_weights(config, weights, dtype), tokenizer


def _check_causal(config: Any) -> None:
    """An error unless the model predicts the next token of a text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind, needs = config.model_type, "the evaluator text: needs a causal language model, which predicts the next token"
    if getattr(config, "is_encoder_decoder", False):
        raise Error(f"{needs}; {kind} translates one sequence into another. Write a function of your own: {FORMS}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Error(f"{needs}; transformers knows none of the type {kind}. Write a function of your own: {FORMS}")
    # Encoders may be used as decoders, but only with weights trained for that, and then their config says so.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise Error(f"{needs}; {kind} is an encoder, which fills in words that are masked. "
                    f"Write a function of your own: {FORMS}")  # fmt: skip


def _with_weights(config: Any, weights: Weights, dtype: Any) -> Any:
    """The model as transformers loads it, so that renamed and fused tensors come to their places."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging

    if getattr(config, "quantization_config", None):
        raise Error("the evaluator text: takes float weights, and these are quantized; see weightsmith.quantize")
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
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        kind = kind[0] if isinstance(kind, tuple) else kind
        model, told = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **{word: dtype}
        )
    except Exception as error:
        raise Error(f"transformers cannot load these weights into {config.model_type}: {_told(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for key, what in (("missing_keys", "lack"), ("unexpected_keys", "have beside what it needs")):
        if told.get(key):
            raise Error(f"these weights do not fit {type(model).__name__}: they {what} {listed(sorted(told[key]))}")
    return model


def _given(model: Any, weights: Weights) -> bool:
    """Copy the weights into a model that is there, if they have its names and shapes."""
    own = model.state_dict(keep_vars=True)
    there = {tensor.data_ptr() for name, tensor in own.items() if name in weights}
    fits = all(name in own and tuple(own[name].shape) == weights.spec(name).shape for name in weights)
    if not fits or any(name not in weights and tensor.data_ptr() not in there for name, tensor in own.items()):
        return False
    weights.load_into(model)
    return True


def _cut(
    text: str, tokenizer: Any, model: Any, length: int | None, windows: int, file: Path
) -> tuple[list[list[int]], int]:
    """Windows of tokens, evenly spread over the text, and how many of each come before the text."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length or LENGTH
    if length is not None and length > most:
        raise Error(f"text:{file}: length={length}, but the model takes {most} tokens at most")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    front = _front(tokenizer)
    body = min(length or LENGTH, most) - len(front)
    if not tokens or len(tokens) + len(front) < 2 or body < 1:
        raise Error(f"text:{file}: {len(tokens)} tokens are too few for a window")
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokens) >= rows:
        raise Error(f"the tokenizer gives the token {max(tokens)}, but the model has embeddings for {rows} only")
    whole = max(len(tokens) // body, 1)
    count = min(windows, whole)
    starts = [(2 * number + 1) * whole // (2 * count) * body for number in range(count)]
    return [front + tokens[start : start + body] for start in starts], len(front)


def _front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    return next((dressed[:at] for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), [])


ROWS = 256
"""Positions whose logits are turned into losses together: a large vocabulary in float32 fills the memory else."""


def _likelihood(reader: _Reader) -> float:
    """Minus the mean nats per token of the text."""
    import torch
    from torch.nn import functional

    total, count, device = 0.0, 0, next(reader.model.parameters()).device
    before = max(reader.front, 1)  # the first token of a text has none before it to be told from
    with torch.no_grad():
        for window in reader.windows:
            tokens = torch.tensor(window, device=device)
            logits = reader.model(input_ids=tokens[None], use_cache=False).logits[0, before - 1 : -1]
            for some, truth in zip(logits.split(ROWS), tokens[before:].split(ROWS), strict=True):
                total += float(functional.cross_entropy(some.float(), truth, reduction="sum"))
            count += len(window) - before
    return -math.inf if math.isnan(total) else -total / count
