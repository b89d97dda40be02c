"""How well language models predict texts, and how near they stay to the one they were made from.

A perplexity moves with the text; what compression or merging has changed shows with far fewer tokens in the
divergence from the original and in how often both find the same token likeliest. All figures come with
intervals over windows of the text, and differences are taken window by window.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._parts import decoded, with_ends
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect._twin import Twin, digest, folder_of, kept, make
from weightsmith.inspect.evaluation import bootstrap, paired_interval
from weightsmith.language import Windows, built, carried, check, cut, described, predictions, read_text, without_weights
from weightsmith.weights import Weights, as_dtype, open

Texts = Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]]

LENGTH, WINDOWS = 512, 16


@dataclass(frozen=True)
class Read:
    """What one model said of one text, window by window."""

    windows: Windows
    losses: Tensor
    """``[windows]``, nats, summed over the tokens of each."""
    divergence: Tensor | None = None
    """``[windows]``, nats, summed: KL from the reference."""
    agreement: Tensor | None = None
    """``[windows]``: tokens for which both find the same one likeliest."""

    @property
    def tokens(self) -> Tensor:
        """``[windows]``: how many are predicted."""
        return torch.tensor(self.windows.predicted, dtype=torch.float64)


@card(
    paper="Jelinek, Mercer, Bahl, Baker 1977, 'Perplexity: a measure of the difficulty of speech recognition tasks'; "
    "Kullback, Leibler 1951, 'On Information and Sufficiency'",
    needs=("data",),
    unit="model",
    claim="the same losses as transformers' own",
)
def language(
    models: Mapping[str, Any] | Sequence[Any],
    texts: Texts,
    reference: Any = None,
    *,
    length: int | None = None,
    windows: int | None = WINDOWS,
    device: str = "cpu",
    dtype: str = "float32",
    cache: str | os.PathLike[str] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Report:
    r"""Perplexity, bits per byte, and the divergence from a reference, of causal language models on texts.

    .. math:: \mathrm{ppl} = \exp\Bigl(-\frac1n \sum_i \log p(x_i \mid x_{<i})\Bigr), \qquad
        \mathrm{KL} = \frac1n \sum_i \sum_v q_i(v) \log \frac{q_i(v)}{p_i(v)}

    with :math:`q` the reference and :math:`x_{<i}` what stands before in the same window.

    Args:
        models: checkpoints by name, or a list: folders of transformers or what else `weightsmith.open` opens that
            carries a config and a tokenizer. Quantized ones of `weightsmith.quantize` are decoded first. One is in
            memory at a time.
        texts: files by name, or a list of them.
        reference: the checkpoint that all are compared with, token by token. Without one, models are compared with
            the first of them by their perplexity alone.
        length: tokens of a window; by default 512, or what the model takes.
        windows: how many, evenly spread over each text; None reads all of it.
        device: where to compute.
        dtype: in what to compute.
        cache: a folder in which the reference's answers are kept (2 bytes a token and word of the vocabulary), so that
            the next call need not ask it again. Without one they are kept as long as the call runs.
        confidence: of the intervals, by resampling windows.
        samples: resamples.
        seed: of the resampling.

    Returns:
        Report: a row a model and text: ``nats`` a token, ``perplexity``, ``bits per byte``, ``ratio`` of perplexities
        to the reference (or the first model), ``KL`` in nats a token and ``agreement`` of likeliest tokens, each
        with its ends ``... low`` and ``... high``.

    Raises:
        ValueError: no model or text; a model that predicts no next token; a model whose tokenizer cuts a text otherwise
            than the reference's.
        MissingPackage: transformers is not installed.
    """
    check("language", length, windows, device)
    named = {name: decoded(open(source)) for name, source in _named(models, "model").items()}
    for weights in named.values():
        described(carried(weights))  # what cannot be read is found before anything is asked
    read = {name: read_text(path) for name, path in _named(texts, "text").items()}
    floats = as_dtype(dtype)
    asked = _Asked(read, length, windows, device, floats)
    found: dict[tuple[str, str], Read] = {}
    with folder_of(cache) as place, progress.task("models", len(named) + (reference is not None)) as advance:
        twins = {} if reference is None else _twins(open(reference), asked, place)
        advance(reference is not None)
        for name, weights in named.items():
            for text, one in _read(weights, asked, twins, name):
                found[name, text] = one
            advance(1)
    baseline = "" if reference is not None else next(iter(named))
    table = []
    for (name, text), one in found.items():
        other = twins[text].losses if reference is not None else found[baseline, text].losses
        same = reference is not None or found[baseline, text].windows.tokens == one.windows.tokens
        compared = other if same and name != baseline else None
        table.append(
            _row(name, text, one, compared, len(named) > 1 or reference is not None, confidence, samples, seed)
        )
    notes = _notes(found, reference is not None, baseline if len(named) > 1 else "", confidence, dtype)
    return Report(_title(named, read), {}, table, _plots(table, list(read)), notes)


@dataclass(frozen=True)
class _Asked:
    texts: Mapping[str, str]
    length: int | None
    windows: int | None
    device: str
    dtype: torch.dtype

    def cut(self, name: str, tokenizer: Any, model: Any) -> Windows:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = self.length or min(LENGTH, most or LENGTH)
        return cut(self.texts[name], tokenizer, model, length, self.windows, name)


def _named(given: Any, what: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        found = dict(given)
    else:
        if isinstance(given, str | os.PathLike | Weights) or not isinstance(given, Sequence):
            given = [given]
        found = {}
        for number, one in enumerate(given):
            name = os.fspath(one) if isinstance(one, str | os.PathLike) else f"{what} {number + 1}"
            found[name if name not in found else f"{name} ({number + 1})"] = one
    if not found:
        raise Error(f"language needs at least one {what}")
    return found


def _logs(model: Any, windows: Windows) -> Iterator[tuple[int, Tensor, Tensor]]:
    with progress.task("windows", len(windows.tokens)) as advance:
        for number, window in enumerate(windows.tokens):
            for logits, truth in predictions(model, window, windows.before):
                yield number, logits.log_softmax(dim=1), truth
            advance(1)


def _twins(weights: Weights, asked: _Asked, place: Path) -> dict[str, Twin]:
    """What the reference says of every text; the model is built only where something is not known yet."""
    plain = decoded(weights)
    files = carried(plain)
    ready: list[Any] = []

    def model() -> Any:
        if not ready:
            ready.append(built(plain, files, asked.dtype)[0].to(asked.device).eval())
        return ready[0]

    shell, tokenizer = without_weights(files)
    found = {}
    for name, text in asked.texts.items():
        windows = asked.cut(name, tokenizer, shell)
        key = digest(weights, text, asked.length, asked.windows, str(asked.dtype))
        found[name] = kept(place, key, windows.tokens) or make(
            place,
            key,
            windows.tokens,
            sum(windows.predicted),
            shell.config.get_text_config().vocab_size,
            lambda windows=windows: _logs(model(), windows),
        )
    return found


def _read(weights: Weights, asked: _Asked, twins: Mapping[str, Twin], name: str) -> Iterator[tuple[str, Read]]:
    model, tokenizer = built(weights, carried(weights), asked.dtype)
    model = model.to(asked.device).eval()
    for text in asked.texts:
        windows = asked.cut(text, tokenizer, model)
        twin = twins.get(text)
        if twin is not None and twin.tokens != windows.tokens:
            raise Error(
                f"{name} cuts {text} into other tokens than the reference, so they cannot be compared token by token; "
                "leave the reference out and compare bits per byte"
            )
        yield text, _scored(model, windows, twin)
    del model
    gc.collect()  # before the next one needs the memory


def _scored(model: Any, windows: Windows, twin: Twin | None) -> Read:
    count = len(windows.tokens)
    losses, divergence, agreement = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    done = 0
    for number, logs, truth in _logs(model, windows):
        losses[number] -= logs.gather(1, truth[:, None]).sum(dtype=torch.float64).cpu()
        if twin is not None:
            said, likeliest = (one.to(logs.device) for one in twin.rows(done, done + len(truth)))
            own = logs[:, : said.shape[1]]
            if own.shape[1] < said.shape[1]:
                raise Error(f"a model of {own.shape[1]} tokens cannot be compared with a reference of {said.shape[1]}")
            share = said.exp()
            # What both shares sum to, 1, is added and taken away: so no token's part is below zero, and rounding is.
            parts = torch.where(share > 0, share * (said - own), 0) - share + own.exp()
            divergence[number] += parts.sum(dtype=torch.float64).cpu()
            agreement[number] += int((logs.argmax(dim=1) == likeliest).sum())
        done += len(truth)
    return Read(windows, losses) if twin is None else Read(windows, losses, divergence, agreement)


# The table


def _row(
    name: str, text: str, one: Read, other: Tensor | None, with_ratio: bool, confidence: float, samples: int, seed: int
) -> dict[str, Any]:
    tokens = one.tokens
    options = {"weight": tokens, "confidence": confidence, "samples": samples, "seed": seed}
    loss = bootstrap(one.losses / tokens, **options) if bool(one.losses.isfinite().all()) else None
    row: dict[str, Any] = {"model": name, "text": text, "tokens": int(tokens.sum())}
    row |= with_ends("nats", loss) | with_ends("perplexity", None if loss is None else loss.map(_exp))
    row["bits per byte"] = float(one.losses.sum()) / math.log(2) / max(sum(one.windows.spans), 1)
    if with_ratio:
        difference = None
        if other is not None and loss is not None and bool(other.isfinite().all()):
            difference = paired_interval(one.losses / tokens, other / tokens, **options)
        row |= with_ends("ratio", None if difference is None else difference.map(_exp))
    if one.divergence is not None and one.agreement is not None:
        known = bool(one.divergence.isfinite().all())
        row |= with_ends("KL", bootstrap(one.divergence / tokens, **options) if known else None)
        row |= with_ends("agreement", bootstrap(one.agreement / tokens, **options))
    return row


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _title(named: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    return f"{len(named)} model{'s' * (len(named) > 1)} on {len(texts)} text{'s' * (len(texts) > 1)}"


def _notes(
    found: Mapping[tuple[str, str], Read], has_reference: bool, baseline: str, confidence: float, dtype: str
) -> list[str]:
    fewest = min(len(one.windows.tokens) for one in found.values())
    notes = [f"Intervals hold with a confidence of {confidence:g}, over windows; computed in {dtype}."]
    if has_reference:
        notes.append("KL and agreement are with the reference, and ratio is to its perplexity.")
    elif baseline:
        notes.append(f"Ratio is to the perplexity of {baseline}, on the same windows.")
    if fewest < 8:
        notes.append(f"With {fewest} window{'s' * (fewest > 1)} an interval says little; take more, or a longer text.")
    if any(not bool(one.losses.isfinite().all()) for one in found.values()):
        notes.append("A model without figures gives no number (NaN or infinity) for some token.")
    return notes


def _plots(table: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Plot]:
    """A drawing a figure: bars a model, a colour a text."""
    titles = {
        "perplexity": "perplexity",
        "KL": "KL from the reference, nats a token",
        "agreement": "same likeliest token",
    }
    plots = []
    for figure, axis in titles.items():
        lines = []
        for text in texts:
            rows = [row for row in table if row["text"] == text and row.get(figure) is not None]
            if rows:
                ends = ([row[f"{figure} {end}"] for row in rows] for end in ("low", "high"))
                names = [_short(row["model"]) for row in rows]
                lines.append(Line(_short(text), names, [row[figure] for row in rows], *ends, style="bars"))
        if lines and all(line.x == lines[0].x for line in lines):
            plots.append(Plot(axis[0].upper() + axis[1:], "model", axis, lines))
    return plots


def _short(name: str) -> str:
    return Path(name.rstrip("/")).name or name
