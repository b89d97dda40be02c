"""Quality against bytes: what each recipe has to give at each width, side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightsmith import calibration
from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.quantize._auto import RECIPES
from weightsmith.quantize._described import codes
from weightsmith.quantize._one_shot import one_shot
from weightsmith.quantize.room import Source
from weightsmith.weights import Pattern, Weights, open

if TYPE_CHECKING:
    from weightsmith.inspect import Report


@card(
    paper="Jin et al. 2024, 'A Comprehensive Evaluation of Quantization Strategies for Large Language Models' (methods "
    "by widths, on several texts)",
    needs=("data",),
    unit="model",
    claim="the figures are those of the checkpoints that the same settings write",
)
def frontier(
    weights: Source,
    evaluate: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]],
    *,
    calibrate: str | Sequence[str] | Iterable[Any],
    bits: Sequence[float] = (2, 3, 4, 8),
    recipes: Sequence[str] = ("nearest", "gptq"),
    group: int | None = 64,
    symmetric: bool = False,
    pattern: Pattern | None = None,
    samples: int = 32,
    length: int = 512,
    windows: int = 16,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Divergence and perplexity of quantized models over their bytes, for several recipes and widths.

    Args:
        weights: a folder of transformers, or what else `weightsmith.open` opens that carries a config and a tokenizer.
        evaluate: texts to judge on, other than those that are calibrated on; two are better than one.
        calibrate: text files, or batches.
        bits: widths; those between two whole numbers are means of a mixed budget.
        recipes: names of `weightsmith.quantize.RECIPES`.
        group: inputs that share parameters, or the most that do where this does not fill a row.
        symmetric: whether zero lies in the middle of the grid.
        pattern: which matrices.
        samples, length: windows of the calibration texts.
        windows: of each text that is judged on.
        dtype: in what the model computes.
        device: where.
        seed: of the choice of windows.

    Returns:
        Report: a row a recipe, width and text: ``bytes in all``, ``bits a weight``, ``KL``, ``agreement``,
        ``perplexity`` and ``ratio`` to the whole model with the ends of their intervals, and ``best``, whether nothing
        as small is nearer on that text. Plots: the frontier of each text. A note tells the calibration's fingerprint,
        and warns of texts that are calibrated on. Memory: that of `one_shot`, and the codes of all of them.

    Raises:
        Error: unknown recipes, no text, a model that predicts no next token, or what the parts refuse.
    """
    from weightsmith.inspect import Report, language
    from weightsmith.language import carried, described, read_text

    for name in recipes:
        if name not in RECIPES:
            raise Error(f"there is no recipe {name!r}{did_you_mean(name, RECIPES)}; known: {', '.join(RECIPES)}")
    texts = dict(evaluate) if isinstance(evaluate, Mapping) else {str(path): path for path in evaluate}
    if not texts or not recipes or not bits:
        raise Error("frontier needs at least one text to judge on, one recipe and one width")
    opened = open(weights)
    described(carried(opened))  # a model that predicts no next token is found before anything is made
    for path in texts.values():
        read_text(path)
    batches = calibration.batches(opened, calibrate, samples, length, seed=seed)
    made: dict[str, Weights] = {}
    keys: dict[str, tuple[str, float]] = {}
    for name in recipes:
        recipe = RECIPES[name]
        for width in bits:
            word = f"{name} {width:g}"
            keys[word] = (name, float(width))
            made[word] = one_shot(
                opened, width, calibrate=batches, method=recipe.method, transform=recipe.transform, group=group,
                symmetric=symmetric, indivisible="shrink", pattern=pattern, dtype=dtype, device=device, seed=seed,
                **recipe.options,
            )  # fmt: skip
    told = language(made, texts, opened, windows=windows, dtype=dtype, device=device, seed=seed)
    sizes = {word: _sizes(own) for word, own in made.items()}
    rows = []
    for row in told.rows():
        name, width = keys[row["model"]]
        rows.append({
            "recipe": name, "bits": width, **sizes[row["model"]],
            **{key: value for key, value in row.items() if key != "model"},
        })  # fmt: skip
    for row in rows:
        row["best"] = math.isfinite(row["KL"]) and not any(
            other["text"] == row["text"] and other["bytes in all"] <= row["bytes in all"] and other["KL"] < row["KL"]
            for other in rows
        )
    notes = _notes(batches, texts)
    figures = {"recipes": len(recipes), "widths": len(bits), "bytes in all before": opened.nbytes}
    return Report("Quality against bytes", figures, rows, [_plot(rows, text) for text in texts], notes)


def _sizes(weights: Weights) -> dict[str, float]:
    coded = codes(weights).values()
    values = sum(math.prod(code.shape) for code in coded)
    return {"bits a weight": 8 * sum(code.nbytes for code in coded) / max(values, 1), "bytes in all": weights.nbytes}


def _plot(rows: Sequence[Mapping[str, Any]], text: str) -> Any:
    from weightsmith.inspect import Line, Plot

    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = sorted(
            (row for row in rows if row["recipe"] == name and row["text"] == text), key=lambda row: row["bytes in all"]
        )
        lines.append(Line(name, [row["bytes in all"] / 1e6 for row in own], [row["KL"] for row in own]))
    return Plot(f"Divergence over size: {text}", "MB in all", "KL, nats a token", lines)


def _notes(batches: Any, texts: Mapping[str, Any]) -> list[str]:
    notes = []
    fingerprint = getattr(batches, "fingerprint", None)
    if fingerprint is not None:
        notes.append(
            f"Calibrated on {len(batches)} windows of {batches.length} tokens, fingerprint {fingerprint[:16]}."
        )
        for name, path in texts.items():
            if (share := batches.overlap(path)) > calibration.MOST_SHARED:
                notes.append(f"Warning: {share:.0%} of {name} is calibrated on as well, so it flatters the result.")
    if len(texts) < 2:
        notes.append("One text tells of its own kind alone: judge on another one as well.")
    return notes
