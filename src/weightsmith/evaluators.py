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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from weightsmith.errors import Error, did_you_mean, listed, told

if TYPE_CHECKING:
    from weightsmith.language import Windows
    from weightsmith.weights import Weights

Evaluate = Callable[["Weights"], float]
"""Quality on held-out data; higher is better."""

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
            raise Error(f"{file}:{name} failed{_where(error, file)}: {told(error)}") from error
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
        raise Error(f"{file}:{name} failed{_where(error, file)}: {told(error)}") from error


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
        raise Error(f"{file}: failed{_where(error, file)} when it was read: {told(error)}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return vars(module)


def _where(error: BaseException, file: Path) -> str:
    """The last line of the file that an error went through."""
    frames, here = traceback.extract_tb(error.__traceback__), file.resolve()
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == here]
    return f" at line {lines[-1]}" if lines else ""


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


def text_evaluator(
    path: str | os.PathLike[str],
    *,
    length: int | None = None,
    windows: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
) -> Evaluate:
    """Minus the mean nats per token of a text; see `evaluator`."""
    from weightsmith.language import built, carried, check, cut, given, read_text
    from weightsmith.weights import as_dtype

    text = read_text(path)
    check(f"text:{path}", length, windows, device)
    floats = as_dtype(dtype)
    latest: list[tuple[dict[str, bytes], Any, Windows]] = []

    def evaluate(weights: Weights) -> float:
        files = carried(weights)
        if not (latest and latest[0][0] == files and given(latest[0][1], weights)):
            latest.clear()  # before the next one needs the memory
            model, tokenizer = built(weights, files, floats)
            parts = cut(text, tokenizer, model, length, windows, f"text:{path}")
            latest.append((files, model.to(device).eval(), parts))
        return _likelihood(*latest[0][1:])

    return evaluate


def _likelihood(model: Any, windows: Windows) -> float:
    """Minus the mean nats per token of the text."""
    from torch.nn import functional

    from weightsmith.language import predictions

    total = 0.0
    for window in windows.tokens:
        for logits, truth in predictions(model, window, windows.before):
            total += float(functional.cross_entropy(logits, truth, reduction="sum"))
    return -math.inf if math.isnan(total) else -total / sum(windows.predicted)


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
