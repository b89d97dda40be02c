"""A fair share of a result for each of those that brought it about: inputs, tensors, layers, models.

A player's Shapley value is the mean of what the result gains when it joins, over all orders of joining. It is computed
exactly from all coalitions for a dozen players or so, and estimated with intervals for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith import progress
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.weights import Weights, open, same_names

Value = Callable[[Tensor], Tensor]
"""``coalitions [b, players] bool -> values [b]``."""

MOST_EXACT = 16
"""Players up to which all coalitions are asked."""

_GROUPS = 20
"""Parts that a regression's samples are cut into, for its interval."""


@dataclass(frozen=True)
class Shapley:
    """Who brought about how much."""

    names: tuple[str, ...]
    values: Tensor
    """``[players]`` float64; they sum to ``whole - empty``."""
    errors: Tensor
    """``[players]`` standard errors; 0 where values are exact."""
    whole: float
    empty: float
    method: str
    evaluations: int
    """How many coalitions were asked for."""

    def report(self) -> Report:
        """The shares, a player a row, with 95 % intervals."""
        low, high = (self.values - 1.96 * self.errors).tolist(), (self.values + 1.96 * self.errors).tolist()
        rows = [
            {"player": name, "value": value, "low": one, "high": other}
            for name, value, one, other in zip(self.names, self.values.tolist(), low, high, strict=True)
        ]
        bars = Line("value", list(self.names), self.values.tolist(), low, high, style="bars")
        figures = {
            "all": self.whole,
            "none": self.empty,
            "sum of shares": float(self.values.sum()),
            "method": self.method,
            "evaluations": self.evaluations,
        }
        return Report("Shapley values", figures, rows, [Plot("Shapley values", "player", "share", [bars])])


@card(
    paper="Shapley 1953, 'A Value for n-Person Games'; Lundberg, Lee 2017, 'A Unified Approach to Interpreting Model "
    "Predictions'; Covert, Lee 2021, 'Improving KernelSHAP'",
    covers=("dont-be-fooled",),
    unit="model",
    claim="exact up to 16 players; beyond, intervals that hold the exact values",
)
def shapley(
    value: Value,
    players: int | Sequence[str],
    *,
    method: Literal["exact", "permutation", "kernel"] | None = None,
    samples: int = 2048,
    seed: int = 0,
    at_once: int = 1024,
) -> Shapley:
    r"""Each player's share of ``value(all) - value(none)``.

    .. math:: \phi_i = \sum_{S \not\ni i} \frac{|S|!\,(p - |S| - 1)!}{p!} \bigl(v(S \cup i) - v(S)\bigr)

    Args:
        value: ``coalitions [b, p] bool -> [b]``: what those that are there bring about. Not to be random.
        players: how many, or their names.
        method: ``"exact"`` asks all :math:`2^p` coalitions; ``"permutation"`` walks random orders and their reverses;
            ``"kernel"`` solves a weighted regression on random coalitions and their complements. None is exact up to
            16 players, then permutations.
        samples: coalitions to ask, about; for the two estimates.
        seed: of the samples.
        at_once: coalitions handed over together.

    Returns:
        Shapley: ``values [p]`` that sum to the whole, ``errors [p]``, and ``report()``.

    Raises:
        ValueError: no player, too many for the exact way, too few samples, values that are not finite.

    >>> found = shapley(lambda s: s[:, 0] * 2.0 + s[:, 1] * s[:, 2] * 4.0, ["a", "b", "c"])
    >>> found.values
    tensor([2., 2., 2.], dtype=torch.float64)
    """
    names = tuple(f"player {i}" for i in range(players)) if isinstance(players, int) else tuple(players)
    count = len(names)
    if not count:
        raise Error("shapley needs at least 1 player, got 0")
    if method not in (None, "exact", "permutation", "kernel"):
        raise Error(f"method is exact, permutation or kernel; got {method!r}")
    if at_once < 1:
        raise Error(f"at_once is at least 1, got {at_once}")
    chosen = method or ("exact" if count <= MOST_EXACT else "permutation")
    chosen = "exact" if count == 1 else chosen
    asked = _Asked(value, names, at_once)
    if chosen == "exact":
        if count > 22:
            raise Error(f"2^{count} coalitions are too many; use method='permutation'")
        values, errors, whole, empty = _exact(asked, count)
    else:
        generator = torch.Generator().manual_seed(seed)
        estimate = _permutations if chosen == "permutation" else _kernel
        values, errors, whole, empty = estimate(asked, count, samples, generator)
    return Shapley(names, values, errors, whole, empty, chosen, asked.count)


class _Asked:
    """Values of coalitions, checked and counted."""

    def __init__(self, value: Value, names: Sequence[str], at_once: int):
        self.value, self.names, self.at_once, self.count = value, names, at_once, 0

    def __call__(self, coalitions: Tensor) -> Tensor:
        parts = []
        with progress.task("coalitions", len(coalitions)) as advance:
            for part in coalitions.split(self.at_once):
                found = torch.as_tensor(self.value(part)).detach().double().cpu()
                if found.shape != (len(part),):
                    raise Error(
                        f"value gives {list(found.shape)} for {len(part)} coalitions; it should be [{len(part)}]"
                    )
                if not found.isfinite().all():
                    row = part[int((~found.isfinite()).nonzero()[0])]
                    there = [name for name, here in zip(self.names, row.tolist(), strict=True) if here]
                    raise Error(f"the value of {', '.join(there) or 'nobody'} is not finite")
                parts.append(found)
                advance(len(part))
        self.count += len(coalitions)
        return torch.cat(parts)


Found = tuple[Tensor, Tensor, float, float]
"""Values, their standard errors, the value of all and of none."""


def _exact(asked: _Asked, count: int) -> Found:
    codes = torch.arange(2**count)
    members = (codes[:, None] >> torch.arange(count)) & 1 == 1
    values, sizes = asked(members), members.sum(dim=1)
    weights = torch.tensor([1 / (count * math.comb(count - 1, size)) for size in range(count)], dtype=torch.float64)
    shares = []
    for player in range(count):
        out = codes[~members[:, player]]
        gains = values[out + 2**player] - values[out]
        shares.append((weights[sizes[out]] * gains).sum())
    return torch.stack(shares), torch.zeros(count, dtype=torch.float64), float(values[-1]), float(values[0])


def _permutations(asked: _Asked, count: int, samples: int, generator: torch.Generator) -> Found:
    pairs = samples // (2 * (count - 1))  # the ends of all walks are the same two coalitions
    if pairs < 2:
        raise Error(f"permutations of {count} players need at least {4 * (count - 1)} samples, got {samples}")
    orders = torch.rand(pairs, count, generator=generator).argsort(dim=1)
    orders = torch.stack([orders, orders.flip(1)], dim=1).flatten(0, 1)
    places = orders.argsort(dim=1)  # when each player joins
    steps = torch.arange(1, count)
    walks = places[:, None, :] < steps[None, :, None]
    ends = asked(torch.tensor([[False] * count, [True] * count]))
    inner = asked(walks.flatten(0, 1)).reshape(2 * pairs, count - 1)
    whole = torch.cat([ends[:1].expand(2 * pairs, 1), inner, ends[1:].expand(2 * pairs, 1)], dim=1)
    gains = whole.diff(dim=1).gather(1, places).reshape(pairs, 2, count).mean(dim=1)
    return gains.mean(dim=0), gains.std(dim=0) / pairs**0.5, float(ends[1]), float(ends[0])


def _kernel(asked: _Asked, count: int, samples: int, generator: torch.Generator) -> Found:
    pairs = samples // 2
    if pairs < max(2 * count, 2 * _GROUPS):
        raise Error(f"a regression on {count} players needs {max(4 * count, 4 * _GROUPS)} samples, got {samples}")
    sizes = torch.arange(1, count, dtype=torch.float64)
    drawn = torch.multinomial(1 / (sizes * (count - sizes)), pairs, replacement=True, generator=generator) + 1
    places = torch.rand(pairs, count, generator=generator).argsort(dim=1).argsort(dim=1)
    members = places < drawn[:, None]
    empty, whole = asked(torch.tensor([[False] * count, [True] * count])).tolist()
    values = asked(torch.stack([members, ~members], dim=1).flatten(0, 1)) - empty
    rows = torch.stack([members, ~members], dim=1).flatten(0, 1).double()
    found = _regressed(rows, values, whole - empty)
    # The jackknife over groups of pairs: without each, the regression anew.
    group = torch.arange(pairs).repeat_interleave(2) % _GROUPS
    without = torch.stack([_regressed(rows[group != g], values[group != g], whole - empty) for g in range(_GROUPS)])
    spread = (without - without.mean(dim=0)).square().sum(dim=0) * (_GROUPS - 1) / _GROUPS
    return found, spread.sqrt(), whole, empty


def _regressed(rows: Tensor, values: Tensor, total: float) -> Tensor:
    """Least squares under the constraint that coefficients sum to the total; coalitions were drawn by their weight."""
    gram = rows.T @ rows / len(rows)
    moments = rows.T @ values / len(rows)
    ones = torch.ones_like(moments)
    inverse = torch.linalg.pinv(gram, hermitian=True)
    slack = (ones @ inverse @ moments - total) / (ones @ inverse @ ones)
    return inverse @ (moments - slack * ones)


@card(
    paper="Shapley 1953, 'A Value for n-Person Games', with tensors as players",
    covers=("dont-be-fooled",),
    needs=("evaluate",),
    unit="model",
    claim="tells what each part of a fine-tune is worth, whatever the others do",
)
def swapped(first: Any, second: Any, groups: Mapping[str, Any], evaluate: Callable[[Weights], float]) -> Value:
    """The value of taking some parts of one checkpoint into another: a game for `shapley` whose players are tensors.

    Args:
        first: the checkpoint where nobody has joined; anything that `weightsmith.open` opens.
        second: the checkpoint where all have.
        groups: players: names to patterns of tensors. Every tensor belongs to one at most; those of none stay first's.
        evaluate: ``weights -> number``.

    Returns:
        ``coalitions [b, players] -> [b]``, with players in the order of ``groups``.

    Raises:
        ValueError: no tensor for a player, one for two players, checkpoints of different tensors.

    >>> one = {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])}
    >>> two = {"a": torch.tensor([1.0]), "b": torch.tensor([5.0])}
    >>> value = swapped(one, two, {"a": "a", "b": "b"}, lambda w: float(w["a"] + w["b"]))
    >>> shapley(value, ["a", "b"]).values
    tensor([1., 5.], dtype=torch.float64)
    """
    start, end = open(first), open(second)
    same_names(start, end, "swapped needs checkpoints of the same tensors")
    taken: dict[str, str] = {}
    parts = []
    for player, pattern in groups.items():
        names = start.names(pattern)
        if not names:
            raise Error(f"no tensor fits {pattern!r}, the pattern of player {player!r}")
        twice = [name for name in names if name in taken]
        if twice:
            raise Error(f"{twice[0]} belongs to two players: {taken[twice[0]]!r} and {player!r}")
        taken |= dict.fromkeys(names, player)
        parts.append(end.select(set(names).__contains__))

    def value(coalitions: Tensor) -> Tensor:
        found = []
        for row in coalitions.tolist():
            weights = start
            for part, here in zip(parts, row, strict=True):
                weights = weights | part if here else weights
            found.append(float(evaluate(weights)))
        return torch.tensor(found, dtype=torch.float64)

    return value
