"""Average only those fine-tunes that help.

Going from the best model down, a model stays in the average if the average with it is no worse on
held-out data. So a bad run cannot spoil the soup, and the result is never worse on that data than
the best single model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightsmith import progress
from weightsmith.card import card
from weightsmith.evaluators import Evaluate
from weightsmith.merge import _mean
from weightsmith.merge.room import Source, check_alike, lift, opened_models
from weightsmith.weights import Weights

_mean_of = lift(_mean.mean)


@dataclass(frozen=True)
class Soup:
    """What the next step needs."""

    members: tuple[int, ...]
    """Indices into the models, in the order in which they were taken."""
    score: float
    weights: Weights


@dataclass(frozen=True)
class Tasting:
    """What a person wants to see of a step."""

    candidate: int
    score: float
    taken: bool


def init(models: Sequence[Weights], evaluate: Evaluate) -> tuple[Soup, list[int]]:
    """The best single model as a soup of one, and the others from better to worse (the first of equals first)."""
    scores = [evaluate(model) for model in models]
    # A model that diverged may score NaN, which no order knows: it comes last.
    order = sorted(range(len(models)), key=lambda index: (math.isnan(scores[index]), -scores[index]))
    return Soup((order[0],), scores[order[0]], models[order[0]]), order[1:]


def step(soup: Soup, candidate: int, models: Sequence[Weights], evaluate: Evaluate) -> tuple[Soup, Tasting]:
    """Taste the soup with one model more; keep it if it is no worse."""
    members = (*soup.members, candidate)
    mixed = _mean_of([models[index] for index in members], nonfinite="allow")  # one that diverged scores nothing
    score = evaluate(mixed)
    taken = score >= soup.score
    return (Soup(members, score, mixed) if taken else soup), Tasting(candidate, score, taken)


@card(
    paper="Wortsman et al. 2022, 'Model soups: averaging weights of multiple fine-tuned models improves accuracy "
    "without increasing inference time' (Recipe 1, greedy soup)",
    covers=("model-soups",),
    needs=("evaluate",),
    unit="model",
    claim="on the data it is chosen by, never worse than the best single model",
)
def greedy_soup(
    models: Sequence[Source], evaluate: Evaluate, on_step: Callable[[Tasting], None] | None = None
) -> Weights:
    """The average of those models that do not make it worse on held-out data.

    Args:
        models: fine-tunes of one start; anything that `weightsmith.open` opens.
        evaluate: ``weights -> quality`` on held-out data, higher is better; called 2k - 1 times.
        on_step: told of every model that was tasted.

    Returns:
        Weights: lazy, like every merge. ``lineage`` names the members by their places in ``models``.

    Raises:
        ValueError: no model, or models of different architectures.

    >>> at = [ws.Weights.of({"w": torch.tensor([x])}) for x in (1.0, -2.0, 4.0)]
    >>> greedy_soup(at, lambda w: -abs(float(w["w"])))["w"]         # 1 and -2 average to -0.5; 4 spoils it
    tensor([-0.5000])
    """
    opened = opened_models(models, "greedy_soup")
    check_alike(opened, None, "greedy_soup")
    with progress.task("greedy soup", 2 * len(opened) - 1) as advance:

        def counted(weights: Weights) -> float:
            score = float(evaluate(weights))
            advance(1)
            return score

        soup, order = init(opened, counted)
        for candidate in order:
            soup, tasting = step(soup, candidate, opened, counted)
            if on_step is not None:
                on_step(tasting)
    chosen = {"members": list(soup.members), "score": soup.score}
    return soup.weights.zip_nodes(lambda name, node: node, (), "merge.greedy_soup", chosen)
