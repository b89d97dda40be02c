"""What a model costs: parameters, operations and bytes, from its shape; and the best shape for a given time.

On real machines small and middling models wait for memory rather than for arithmetic, so the bytes that a training
step moves tell its time better than its operations do.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch  # noqa: F401 - the examples speak of it
from torch import nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._plain import layer_of
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.scaling._law import Law
from weightsmith.weights import Weights, open

TRAINING = 3
"""A training step costs three forward passes: one forward, two backward."""

OPTIMIZER_PASSES = 7
"""AdamW reads weight, gradient and two moments and writes weight and moments: seven times the parameters."""

_CONFIG = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
}


@dataclass(frozen=True)
class Shape:
    """The size of a transformer, read off its tensors."""

    parameters: int
    """All of them, tied ones once."""
    embedding: int
    """Those in matrices outside the numbered layers: token and position embeddings and an output head."""
    layers: int
    width: int
    ffn: int
    """Width of the feed-forward layers; 0 where none is recognised."""

    @property
    def body(self) -> int:
        """Parameters without embeddings: the N of Kaplan et al."""
        return self.parameters - self.embedding


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'; Wu, Tang 2024, 'Performance Law of Large "
    "Language Models'",
    covers=("kaplan-scaling-laws", "performance-law-large-language"),
    unit="model",
)
def shape_of(weights: Weights | nn.Module | Mapping[str, Any] | str) -> Shape:
    """Parameters with and without embeddings, depth and widths, from names and shapes alone: nothing is read.

    Layers are what is numbered; of several numberings the one with most parameters counts. The width is the side
    that most matrices inside the layers share (of several, one that matrices outside have too, then the smallest).
    The feed-forward width is the largest that a layer goes to and comes back from (twice it, where gate and up are
    one matrix).

    Args:
        weights: anything `weightsmith.open` opens.

    Raises:
        Error: no numbered layers with matrices.

    >>> block = {"mlp.up.weight": (8, 4), "mlp.down.weight": (4, 8), "norm": (4,)}
    >>> model = {f"layers.{i}.{name}": torch.zeros(shape) for i in range(3) for name, shape in block.items()}
    >>> shape_of(model | {"embed.weight": torch.zeros(10, 4)})
    Shape(parameters=244, embedding=40, layers=3, width=4, ffn=8)
    """
    opened = open(weights)
    tied = opened.ties
    shapes = {name: tuple(opened.spec(name).shape) for name in opened if name not in tied}
    numbered = {name: layer_of(name) for name in shapes if re.search(r"(^|[._/])\d+[._/]", name)}
    sizes: Counter[str] = Counter()
    for name, layer in numbered.items():
        sizes[_numbering(layer)] += math.prod(shapes[name])
    chosen = sizes.most_common(1)[0][0] if sizes else ""
    inside = [name for name, layer in numbered.items() if _numbering(layer) == chosen]
    matrices = {name: shapes[name] for name in inside if len(shapes[name]) == 2}
    if not matrices:
        raise Error("no numbered layers with matrices in these weights, so they have no depth and width")
    sides = Counter(side for shape in matrices.values() for side in set(shape))
    most = max(sides.values())
    ties = [side for side, count in sides.items() if count == most]
    outside = {side for name, shape in shapes.items() if name not in numbered and len(shape) == 2 for side in shape}
    width = min(ties, key=lambda side: (side not in outside, side))
    pairs = set(matrices.values())
    widths = [a for a, b in pairs if b == width and a != width] + [b for a, b in pairs if a == width and b != width]
    both = [x for x in set(widths) if _returns(x, width, pairs)]
    embedding = sum(math.prod(shape) for name, shape in shapes.items() if name not in numbered and len(shape) == 2)
    total = sum(math.prod(shape) for shape in shapes.values())
    return Shape(total, embedding, len({numbered[name] for name in inside}), width, max(both, default=0))


def _numbering(layer: str) -> str:
    return re.sub(r"\d+$", "*", layer)


def _returns(x: int, width: int, pairs: set[tuple[int, ...]]) -> bool:
    there, back = {(x, width), (2 * x, width)}, {(width, x)}
    return bool(there & pairs and back & pairs)


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'",
    covers=("kaplan-scaling-laws",),
    unit="model",
)
def body_size(layers: int, width: int, ffn: int | None = None, gated: bool = False) -> int:
    r"""Parameters of a transformer's matrices without embeddings: :math:`N = n\,(4 d^2 + 2 d f)`, with f = 4 d
    :math:`12\,n\,d^2`.

    Args:
        layers, width: n and d.
        ffn: width of the feed-forward layers, f; 4 d if None.
        gated: three feed-forward matrices instead of two.

    Returns:
        The number of parameters; queries, keys and values all as wide as the model.

    >>> body_size(12, 768), 12 * 12 * 768**2
    (84934656, 84934656)
    """
    inner = 4 * width if ffn is None else ffn
    return layers * (4 * width * width + (3 if gated else 2) * width * inner)


@card(
    paper="Kaplan et al. 2020, 'Scaling Laws for Neural Language Models'",
    covers=("kaplan-scaling-laws",),
    unit="model",
)
def training_flops(parameters: float, tokens: float, *, layers: int = 0, width: int = 0, context: int = 0) -> float:
    r"""Operations of training: :math:`C = (6 N + 6\,n\,d\,T)\, D`; the second term, attention over a context of T
    tokens of which each sees half, is left out unless its numbers are given.

    Args:
        parameters: N, without embeddings.
        tokens: D.
        layers, width, context: n, d and T.

    Returns:
        Floating-point operations.

    >>> training_flops(1e9, 20e9)
    1.2e+20
    """
    return 6 * (parameters + layers * width * context) * tokens


@card(
    paper="Wu, Tang 2024, 'Performance Law of Large Language Models'",
    covers=("performance-law-large-language",),
    unit="model",
    departs="the number of tokens beyond which a model saturates is given by the caller; its formula in the paper "
    "could not be checked",
)
def performance_features(
    model: Weights | nn.Module | Mapping[str, Any] | str,
    tokens: float,
    *,
    saturation: float | None = None,
    discount: float = 1.0,
) -> dict[str, float]:
    r"""A row for the law ``performance``: depth, widths and usable tokens of a model.

    Args:
        model: a configuration (a mapping with words such as ``hidden_size``), or anything `weightsmith.open` opens.
        tokens: tokens of training.
        saturation: more tokens than these count no more: :math:`T' = \min(T, S)`.
        discount: u in (0, 1] for unstable training.

    Raises:
        Error: a number out of range, a configuration without depth or width, weights without numbered layers.

    >>> config = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536}
    >>> performance_features(config, 2e12, saturation=6e11)
    {'depth': 30.0, 'width': 576.0, 'ffn': 1536.0, 'tokens': 600000000000.0, 'discount': 1.0}
    """
    if not tokens > 0 or not (saturation is None or saturation > 0) or not 0 < discount <= 1:
        raise Error("tokens and saturation are above 0, and the discount lies in (0, 1]")
    if isinstance(model, Mapping) and any(isinstance(model.get(word), int) for word in _CONFIG["layers"]):
        depth, width, ffn = (_configured(model, what) for what in ("layers", "width", "ffn"))
    else:
        shape = shape_of(model)
        depth, width, ffn = shape.layers, shape.width, shape.ffn
    usable = tokens if saturation is None else min(tokens, saturation)
    found = {"depth": depth, "width": width, "ffn": ffn, "tokens": usable, "discount": discount}
    return {name: float(value) for name, value in found.items()}


def _configured(config: Mapping[str, Any], what: str) -> int:
    for word in _CONFIG[what]:
        if isinstance(config.get(word), int):
            return config[word]
    if what == "ffn":
        return 4 * _configured(config, "width")
    raise Error(f"the configuration says none of {', '.join(_CONFIG[what])}")


@dataclass(frozen=True)
class Cost:
    """What one training step of a transformer takes."""

    parameters: int
    tokens: int
    flops: float
    bytes: float


@card(
    paper="Inbar, Sernau 2024, 'Time Matters: Scaling Laws for Any Budget'",
    covers=("time-matters",),
    unit="model",
    departs="every operator's inputs and outputs are counted one by one for the shape that is given, with attention "
    "maps written out; the paper's own closed expression could not be checked",
)
def step_cost(
    *,
    layers: int,
    width: int,
    batch: int,
    context: int,
    vocabulary: int,
    heads: int = 1,
    ffn: int | None = None,
    element: int = 4,
    optimizer: int = OPTIMIZER_PASSES,
) -> Cost:
    r"""Operations and bytes of one training step of a plain transformer.

    A forward pass moves each matrix once and each operator's inputs and outputs; a backward pass twice that; the
    optimizer passes over the parameters ``optimizer`` times. Attention is computed in full, also where a mask hides
    half of it (`training_flops` counts that half alone).

    .. math:: bytes = e\,(3\,(P + A) + o\,P)

    Args:
        layers, width, ffn, heads, vocabulary: the model; ``ffn`` is 4 times the width if None.
        batch, context: sequences a step, and tokens of each.
        element: bytes of one number.
        optimizer: passes of the optimizer over the parameters.

    Returns:
        Parameters (the embedding once, as if tied to the head), tokens, operations and bytes of one step.

    Raises:
        Error: a number below 1.

    >>> step_cost(layers=2, width=64, batch=8, context=32, vocabulary=100).parameters
    104704
    """
    inner = 4 * width if ffn is None else ffn
    if min(layers, width, batch, context, vocabulary, heads, inner, element) < 1:
        raise Error("all numbers of a step's cost are 1 or more")
    tokens, body = batch * context, body_size(layers, width, inner)
    parameters = body + vocabulary * width
    maps = heads * context
    moved = (
        (2 * width)  # first norm
        + (width + 3 * width)  # query, key, value
        + (2 * width + maps)  # scores
        + 2 * maps  # softmax
        + (maps + width + width)  # values
        + (width + width)  # output
        + 3 * width  # sum
        + 2 * width  # second norm
        + (width + inner)  # up
        + 2 * inner  # activation
        + (inner + width)  # down
        + 3 * width  # sum
    )
    head = (width + vocabulary) + 2 * vocabulary + 2 * width  # logits, their softmax, and the embeddings read
    activations = tokens * (layers * moved + head)
    flops = 2 * TRAINING * tokens * (parameters + 2 * layers * width * context)
    numbers = TRAINING * (parameters + activations) + optimizer * parameters
    return Cost(parameters, tokens, float(flops), float(element * numbers))


@card(
    paper="Inbar, Sernau 2024, 'Time Matters: Scaling Laws for Any Budget'",
    covers=("time-matters",),
    unit="model",
)
def best_for_time(
    law: Law, clock: Law, candidates: Sequence[Mapping[str, int]], seconds: float, *, interval: bool = False
) -> Report:
    """Which of several models has the lowest predicted loss after so many seconds of training.

    Args:
        law: predicts a loss from ``N`` and ``D``, such as ``chinchilla``.
        clock: a fitted ``step-time`` law of the machine.
        candidates: settings for `step_cost`, one mapping a model.
        seconds: how long will be trained.
        interval: whether to add the law's 90 % interval of each loss (the clock's is left out).

    Returns:
        A row per candidate, the best first.

    Raises:
        Error: no candidates, a time that is not above 0, candidates with different settings.
    """
    if not candidates or not seconds > 0:
        raise Error("best_for_time needs at least one candidate and a time above 0")
    if any(list(settings) != list(candidates[0]) for settings in candidates):
        raise Error("candidates must have the same settings in the same order, to stand in one table")
    rows = []
    for index, settings in enumerate(candidates):
        cost = step_cost(**settings)
        each = float(clock.predict(bytes=cost.bytes, flops=cost.flops))
        tokens = cost.tokens * seconds / each
        told = law.predict(N=cost.parameters, D=tokens, interval=interval)
        row = {"candidate": index, **settings, "parameters": cost.parameters, "seconds a step": each, "tokens": tokens}
        ends = {"low": told.low, "high": told.high} if interval else {}
        rows.append(row | {"loss": told.value if interval else told} | ends)
    rows.sort(key=lambda row: row["loss"])
    line = Line("candidates", [r["parameters"] for r in rows], [r["loss"] for r in rows], style="points")
    return Report(
        f"The best of {len(rows)} models after {seconds:g} seconds",
        {"best candidate": rows[0]["candidate"], "its loss": rows[0]["loss"], "its tokens": rows[0]["tokens"]},
        rows,
        [Plot("Loss after the time", "parameters", "predicted loss", [line], log="x")],
    )
