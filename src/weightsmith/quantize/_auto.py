"""A checkpoint of a wanted size: recipes are tried, and the one whose answers stay nearest is taken.

Widths are shared among the tensors by what each of them costs in nats; what comes before and how codes are chosen is
tried on windows of the text that nothing was calibrated on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from weightsmith import calibration, progress
from weightsmith.card import card
from weightsmith.errors import Error, did_you_mean
from weightsmith.quantize._judged import Judge
from weightsmith.quantize._layout import dequantize
from weightsmith.quantize._one_shot import WIDTHS, embeddings_of, one_shot, with_embeddings
from weightsmith.quantize.budget import Level, curves, mixed
from weightsmith.quantize.room import Source, largest_divisor, planned, targets_of
from weightsmith.weights import Pattern, Step, Weights, as_dtype, open

HELD_OUT = 0.25
"""The share of the windows that recipes are judged on."""

EMBEDDED = (4, 5, 6, 8)
"""Bits that embeddings and head may have."""


class Recipe(NamedTuple):
    """What is done before, and how codes are chosen."""

    method: str
    transform: str | None = None
    options: Mapping[str, Any] = {}


RECIPES: dict[str, Recipe] = {
    "nearest": Recipe("rtn", None, {"clip": 8}),
    "gptq": Recipe("gptq"),
    "awq, nearest": Recipe("rtn", "awq", {"clip": 8}),
    "awq, gptq": Recipe("gptq", "awq"),
}
"""What `auto` tries, by name."""


@card(
    paper="Dong et al. 2020, 'HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks' (widths by the "
    "second order of the loss); the choice among recipes is by plain trial on held-out windows",
    needs=("data",),
    unit="model",
    claim="no other of the recipes that were tried was nearer on the held-out windows",
)
def auto(
    weights: Source,
    size: int | str | None = None,
    *,
    calibrate: str | Sequence[str] | Iterable[Any],
    bits: float | None = None,
    group: int | None = 64,
    recipes: Sequence[str] | None = None,
    pattern: Pattern | None = None,
    samples: int = 32,
    length: int = 512,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Weights:
    """Quantize a language model to a size, by whatever of some recipes keeps its answers nearest.

    Args:
        weights: a folder of transformers, or what else `weightsmith.open` opens that carries a config and a tokenizer.
        size: bytes of all tensors that are written, at most, such as ``80_000_000`` or ``"80MB"``; headers, config and
            tokenizer come on top. Embeddings and head are then quantized too.
        calibrate: text files, or batches. A quarter of the windows is not calibrated on: recipes are judged on it.
        bits: in place of a size, the mean bits of a code; embeddings and head then stay as they are.
        group: inputs that share parameters, or the most that do where this does not fill a row.
        recipes: names of `RECIPES`; default: all of them.
        pattern: which matrices of the blocks.
        samples, length: of the windows.
        dtype: in what the model computes.
        device: where.
        seed: of the choice of windows.

    Returns:
        Weights: with codes; the lineage says what was tried, and how far from the whole model each was, in nats a
        token. Memory: the whole model, and log-probabilities of the windows that are judged on.

    Raises:
        Error: a size that cannot be had, an unknown recipe, a text that is too short.
    """
    if (size is None) == (bits is None):
        raise Error(f"auto takes a size or bits, got size={size!r} and bits={bits!r}")
    opened = open(weights)
    names = list(RECIPES) if recipes is None else list(recipes)
    for name in names:
        if name not in RECIPES:
            raise Error(f"there is no recipe {name!r}{did_you_mean(name, RECIPES)}; known: {', '.join(RECIPES)}")
    about: dict[str, Any] = {"group": group, "symmetric": False, "indivisible": "shrink", "pattern": pattern}
    planned(_rtn(), opened, {**about, "bits": WIDTHS[0]})
    if size is not None:
        _room(opened, _bytes(size), {*targets_of(opened, pattern), *embeddings_of(opened)})
    windows = list(calibration.batches(opened, calibrate, samples, length, seed=seed))
    held = max(round(HELD_OUT * len(windows)), 1)
    if len(windows) <= held:
        raise Error(f"auto needs windows to calibrate and to judge on, got {len(windows)} in all")
    learned, judged = windows[held:], windows[:held]
    judge = Judge(opened, judged, dtype, device)
    running: dict[str, Any] = {"dtype": as_dtype(dtype), "device": device}
    found: dict[str, Sequence[Level]] = dict(
        curves(opened, learned, bits=WIDTHS, method="rtn", clip=4, **about, **running)
    )
    whole = embeddings_of(opened) if size is not None else []
    for name in whole:
        found[name] = _measured(opened, name, group, judge)
    room = None if size is None else _room(opened, _bytes(size), found)
    if room is not None and size is not None:
        _check_room(found, room, _bytes(size))
    chosen = mixed(found, bits, size=room)
    tried: dict[str, float] = {}
    best: tuple[float, Weights] | None = None
    with progress.task("recipes", len(names)) as advance:
        for name in names:
            recipe = RECIPES[name]
            made = one_shot(
                opened, {**{n: b for n, b in chosen.items() if n not in whole}, "*": 8}, calibrate=learned,
                method=recipe.method, transform=recipe.transform, dtype=dtype, device=device, seed=seed,
                **{**about, "pattern": [n for n in chosen if n not in whole]}, **recipe.options,
            )  # fmt: skip
            for one in whole:
                made = with_embeddings(made, chosen[one], about, [one])
            tried[name] = judge(dequantize(made))
            if best is None or tried[name] < best[0]:  # no KL is NaN: see `Judge`
                best = (tried[name], made)
            advance(1)
    assert best is not None
    said = {"size": size, "bits": bits, "group": group, "chosen": min(tried, key=lambda name: tried[name]), "KL": tried}
    made = best[1]
    nodes = {name: made.node(name) for name in made}
    return Weights(nodes, Step("quantize.auto", said, (made.lineage,)), made.files, made.metadata)


def _rtn() -> Any:
    from weightsmith.quantize import rtn

    return rtn.kernel


def _bytes(size: int | str) -> int:
    """Bytes of a word such as ``80MB``."""
    from weightsmith.weights import as_bytes

    found = as_bytes(size) if isinstance(size, str) else size
    assert found is not None, "a size is given"
    return found


def _room(weights: Weights, size: int, coded: Collection[str]) -> int:
    """Bytes that are left for what is coded."""
    ties = weights.ties
    rest = sum(weights.spec(name).nbytes for name in weights if ties.get(name, name) not in coded and name not in ties)
    shapes = 8 * sum(len(weights.spec(name).shape) for name in coded)
    if rest + shapes >= size:
        raise Error(f"{size} bytes cannot be had: what is not quantized takes {rest + shapes} already")
    return size - rest - shapes


def _check_room(found: Mapping[str, Sequence[Level]], room: int, size: int) -> None:
    """An error that says which size can be had."""
    least = sum(min(level.size for level in own) for own in found.values())
    if least > room:
        raise Error(
            f"{size} bytes cannot be had: with the fewest bits that are tried ({WIDTHS[0]}; {EMBEDDED[0]} for "
            f"embeddings and head) it is {size - room + least}; larger groups take less"
        )


def _measured(weights: Weights, name: str, group: int | None, judge: Judge) -> list[Level]:
    """The levels of an embedding: what it costs to round it alone, measured."""
    found = []
    for width in EMBEDDED:
        spec = weights.spec(name)
        own = None if group is None else largest_divisor(spec.shape[1], group)
        made = with_embeddings(weights, width, {"group": own, "indivisible": "error"}, [name])
        size = sum(made.spec(one).nbytes for one in made if one.startswith(f"{name}_") and not one.endswith("_shape"))
        found.append(Level(width, spec.numel * width, size, max(judge(dequantize(made)), 0.0)))
    return found
