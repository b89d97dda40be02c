"""One order from many, and how few liars it takes to change it.

Two systems that about half of the rankings put either way round are put in some order by a median all the
same, and a handful of rankings can turn it. An order that leaves such systems tied says less, and what it
says holds longer. How long is measured by attack: the smallest share of rankings that, replaced by others,
moves the result by a given distance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.ranking._borda import kemeny_order

MOST = 7  # items whose orders an attack tries one by one
AT_ONCE = 1 << 22  # numbers of a chunk of rankings

Statistic = Callable[[Tensor], Tensor]
"""``pairwise [b, n, n] -> places [b, n]``; equal places are ties."""


@card(
    paper="Kemeny 1959, 'Mathematics without numbers'",
    covers=("robust-consensus-ranking-data",),
    unit="model",
)
def pairwise(rankings: Any, weights: Any = None) -> Tensor:
    r"""How much speaks for each item before each other one.

    .. math:: P_{ij} = \sum_m w_m \big(1[r_{mi} < r_{mj}] + \tfrac12 1[r_{mi} = r_{mj}]\big), \qquad \sum w = 1

    Args:
        rankings: ``[m, n]``: the place of every item, less is better; equal places are ties.
        weights: ``[m]``, 0 or more.

    Returns:
        ``[n, n]`` in float64 with a diagonal of one half.

    Raises:
        Error: places that are not finite, fewer than two items, or weights that do not fit.

    >>> pairwise([[1, 2], [1, 2], [2, 1]])[0, 1].item().__round__(4)
    0.6667
    """
    found, mass = _rankings(rankings, weights)
    rows = max(AT_ONCE // found.shape[1] ** 2, 1)
    parts = zip(found.split(rows), mass.split(rows), strict=True)
    return torch.stack([torch.einsum("m,mij->ij", share, _before(part)) for part, share in parts]).sum(0)


def _before(places: Tensor) -> Tensor:
    """``[m, n, n]``: 1 where a ranking has the first item before the second, a half where it ties them."""
    first, second = places[:, :, None], places[:, None]
    return (first < second).double() + 0.5 * (first == second).double()


def _rankings(rankings: Any, weights: Any) -> tuple[Tensor, Tensor]:
    given = rankings.detach().cpu() if isinstance(rankings, Tensor) else numpy.asarray(rankings, dtype=float)
    found = torch.as_tensor(given).double()
    if found.ndim != 2 or not len(found) or found.shape[1] < 2 or not bool(found.isfinite().all()):
        raise Error(f"rankings are finite places [m, n] of 2 items or more, got {list(found.shape)}")
    mass = torch.ones(len(found), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    if mass.shape != found.shape[:1] or not bool((mass >= 0).all()) or not 0 < float(mass.sum()) < math.inf:
        raise Error(f"{len(found)} rankings need as many finite weights of 0 or more, not all 0")
    return found, mass / mass.sum()


@card(
    paper="Fagin, Kumar, Mahdian, Sivakumar, Vee 2006, 'Comparing Partial Rankings'",
    covers=("robust-consensus-ranking-data",),
    unit="model",
)
def weak_order_distance(first: Any, second: Any, *, kind: str = "half") -> Tensor:
    r"""Kendall's distance between orders that may have ties: pairs put the other way round, and pairs tied in one only.

    .. math:: |U| + \tfrac12 (|S| + |T|) \text{ (half)}, \qquad |U| + \max(|S|, |T|) \text{ (hausdorff)}

    with U the pairs in opposite order, S those tied in the first only, T those tied in the second only.

    Args:
        first, second: ``[..., n]`` places, broadcast.
        kind: ``half`` or ``hausdorff``.

    Returns:
        ``[...]``.

    Raises:
        Error: an unknown kind, or different numbers of items.

    >>> weak_order_distance([1, 2, 3], [2, 1, 1]).item(), weak_order_distance([1, 2, 3], [3, 2, 1]).item()
    (2.5, 3.0)
    """
    if kind not in ("half", "hausdorff"):
        raise Error(f"weak_order_distance is half or hausdorff, not {kind!r}")
    one, other = (torch.as_tensor(x).double() for x in (first, second))
    if not one.ndim or not other.ndim or one.shape[-1] != other.shape[-1]:
        raise Error(f"weak_order_distance: places {list(one.shape)} and {list(other.shape)} are not of the same items")
    a, b = ((x[..., :, None] - x[..., None, :]).sign() for x in (one, other))
    opposite = (a * b < 0).sum((-1, -2)) / 2
    only_first = ((a == 0) & (b != 0)).sum((-1, -2)) / 2
    only_second = ((a != 0) & (b == 0)).sum((-1, -2)) / 2
    if kind == "half":
        return opposite + (only_first + only_second) / 2
    return opposite + torch.maximum(only_first, only_second)


# Statistics of pairwise shares, of many at once


def borda_places(shares: Tensor) -> Tensor:
    """The order by Borda's count, as places ``[b, n]`` from 0; equal items stand in the order of their index.

    >>> borda_places(torch.tensor([[[0.5, 0.9], [0.1, 0.5]]])).tolist()
    [[0, 1]]
    """
    points = shares.sum(-1)
    order = (-(points * 1e9).round()).argsort(dim=-1, stable=True)
    return order.argsort(-1)


def kemeny_places(shares: Tensor) -> Tensor:
    """The order that disagrees least, exactly, as places ``[b, n]`` from 0; of equally good ones the first by index.

    >>> kemeny_places(torch.tensor([[[0.5, 0.1], [0.9, 0.5]]])).tolist()
    [[1, 0]]
    """
    count = shares.shape[-1]
    if count > MOST:
        return torch.stack([torch.tensor(kemeny_order(one)[0]).argsort() for one in shares])
    orders = _orders(count)
    # What an order loses: the shares that speak for a later item before an earlier one.
    lost = (orders[:, :, None] > orders[:, None]).double().flatten(1)
    cost = shares.double().flatten(1) @ lost.T
    return orders[((cost * 1e9).round()).argmin(1)].long()


def _orders(count: int) -> Tensor:
    """All places ``[n!, n]``."""
    return torch.tensor(list(itertools.permutations(range(count))), dtype=torch.float64)


def merged_places(shares: Tensor, start: Tensor, threshold: float) -> Tensor:
    """Buckets ``[b, n]`` from 0: neighbours in the order ``start`` are merged while little speaks between them.

    The two neighbouring buckets with the least mean share above one half are merged as long as it is at most the
    threshold; then the shares are taken anew.

    >>> merged_places(torch.tensor([[[0.5, 0.52, 1], [0.48, 0.5, 1], [0, 0, 0.5]]]), torch.tensor([[0, 1, 2]]), 0.1)
    tensor([[0, 0, 1]])
    """
    buckets = start.clone()
    batch, count = buckets.shape
    rows = torch.arange(batch)
    for _ in range(count - 1):
        member = torch.nn.functional.one_hot(buckets, count).double()  # [b, items, buckets]
        size = member.sum(1)
        between = torch.einsum("bip,bij,bjq->bpq", member, shares.double() - 0.5, member)
        upper = torch.arange(count - 1)
        pairs = size[:, :-1] * size[:, 1:]
        margin = torch.where(pairs > 0, between[:, upper, upper + 1] / pairs.clamp(min=1), torch.inf)
        least, place = margin.min(1)
        merge = least <= threshold + 1e-12
        if not bool(merge.any()):
            break
        follow = buckets > place[rows, None]
        buckets = torch.where(merge[:, None] & follow, buckets - 1, buckets)
    return buckets


def _statistic(name: str, threshold: float | None) -> Statistic:
    if name not in ("kemeny", "borda"):
        raise Error(f"a consensus is by kemeny or borda, not {name!r}")
    places = kemeny_places if name == "kemeny" else borda_places
    if threshold is None:
        return places
    if not 0 <= threshold <= 0.5:
        raise Error(f"a threshold of margins lies between 0 and 1/2, got {threshold:g}")
    return lambda shares: merged_places(shares, places(shares), threshold)


@card(
    paper="Goibert, Calauzènes, Irurozki, Clémençon 2023, 'Robust Consensus in Ranking Data Analysis: Definitions, "
    "Properties and Computational Issues'",
    covers=("robust-consensus-ranking-data",),
    unit="model",
    claim="with ties where little speaks either way, it takes more false rankings to change it",
    departs="buckets are merged by the mean margin between neighbours, taken anew after every merge",
)
def consensus_ranking(
    rankings: Any,
    *,
    weights: Any = None,
    statistic: str = "kemeny",
    threshold: float | None = 0.05,
    names: Sequence[str] | None = None,
) -> Report:
    """The median of rankings, with ties where it would say more than the rankings do.

    Args:
        rankings: ``[m, n]`` places, less is better, ties allowed.
        weights: ``[m]``.
        statistic: ``kemeny`` (exact, at most 16 items) or ``borda``.
        threshold: neighbours whose mean share is above one half by no more than this are tied; None ties nobody.
        names: of the items.

    Returns:
        Report: a row per item: ``place`` (equal in a bucket) and ``before next``, the share of rankings that put its
        bucket before the next one; ``distance``, the mean Kendall distance to the rankings.

    Raises:
        Error: an unknown statistic, more than 16 items (kemeny), or as `pairwise`.

    >>> said = [[1, 2, 3]] * 6 + [[2, 1, 3]] * 5
    >>> consensus_ranking(said)["place"], consensus_ranking(said, threshold=None)["place"]
    ([1, 1, 2], [1, 2, 3])
    """
    found, mass = _rankings(rankings, weights)
    count = found.shape[1]
    called = [str(i) for i in range(count)] if names is None else [str(name) for name in names]
    if len(called) != count:
        raise Error(f"consensus_ranking: {len(called)} names for {count} items")
    shares = pairwise(found, mass)
    places = _statistic(statistic, threshold)(shares[None])[0]
    table = []
    for i in sorted(range(count), key=lambda i: (int(places[i]), i)):
        here, below = places == places[i], places == places[i] + 1
        ahead = float(shares[here][:, below].mean()) if bool(below.any()) else None
        table.append({"item": called[i], "place": int(places[i]) + 1, "before next": ahead})
    distance = float((mass * weak_order_distance(places, found)).sum())
    figures = {"items": count, "buckets": int(places.max()) + 1, "rankings": len(found), "distance": distance}
    return Report(f"consensus of rankings ({statistic})", figures, table)


@card(
    paper="Goibert, Calauzènes, Irurozki, Clémençon 2023, 'Robust Consensus in Ranking Data Analysis: Definitions, "
    "Properties and Computational Issues'",
    covers=("robust-consensus-ranking-data",),
    unit="model",
    claim="replacing this share of the rankings does move the result: an upper bound of the breakdown point",
    departs="attacks put one false ranking in place of the true ones that differ from it most, and all false rankings "
    "are tried; the paper follows the gradient of a smoothed statistic",
)
def breakdown(
    rankings: Any,
    *,
    weights: Any = None,
    statistic: str | Statistic = "kemeny",
    threshold: float | None = None,
    distance: float = 1.0,
    kind: str = "half",
    steps: int = 100,
) -> Report:
    r"""How small a share of rankings, replaced by one false ranking, moves the consensus by a distance: an upper bound.

    .. math:: \varepsilon = \inf \{ \varepsilon : \exists Q, \; \mathrm{TV}(P, Q) \le \varepsilon, \;
        d(T(P), T(Q)) \ge \delta \}

    Args:
        rankings: ``[m, n]``, n <= 7.
        weights: ``[m]``.
        statistic: ``kemeny``, ``borda``, or a function of pairwise shares.
        threshold: of ties, as in `consensus_ranking`.
        distance: :math:`\delta`, by `weak_order_distance`.
        kind: of the distance.
        steps: shares tried: multiples of 1 / steps, up to 1.

    Returns:
        Report: ``breakdown``, the share at which an attack moved it that far (infinite where none did), which is no
        less than the :math:`\varepsilon` above; ``false ranking``; the distance reached at every share as a plot.

    Raises:
        Error: more than 7 items, or no distance above 0.

    >>> said = [[1, 2]] * 7 + [[2, 1]] * 3
    >>> breakdown(said)["breakdown"]                                # at 5 to 5 the first by index still leads
    0.21
    """
    found, mass = _rankings(rankings, weights)
    count = found.shape[1]
    if count > MOST:
        raise Error(f"breakdown tries all orders of at most {MOST} items, got {count}")
    if not distance > 0 or steps < 1:
        raise Error(f"breakdown: distance is above 0 and steps 1 or more, got {distance:g} and {steps}")
    rule = _statistic(statistic, threshold) if isinstance(statistic, str) else statistic
    flat = _before(found).flatten(1)
    true = rule((mass @ flat).view(1, count, count))[0]
    attacks = _orders(count)
    false = _before(attacks)
    # Per attack, the true rankings by how far they are from it (what they have not before what it has), furthest first.
    apart = (false.flatten(1) == 1).double() @ (1 - flat).T
    order = apart.argsort(dim=1, descending=True, stable=True)
    ahead = mass[order].cumsum(1) - mass[order]
    reached, chosen = [], None
    for step in range(1, steps + 1):
        moved = step / steps
        taken = torch.zeros_like(apart).scatter_(1, order, torch.minimum((moved - ahead).clamp(min=0), mass[order]))
        shares = ((mass - taken) @ flat).view(-1, count, count) + moved * false
        away = weak_order_distance(rule(shares), true, kind=kind)
        reached.append(float(away.max()))
        if reached[-1] >= distance - 1e-12:
            chosen = attacks[int(away.argmax())]
            break
    shares_tried = [(index + 1) / steps for index in range(len(reached))]
    figures = {
        "breakdown": shares_tried[-1] if chosen is not None else math.inf,
        "false ranking": None if chosen is None else [int(one) + 1 for one in chosen],
        "distance": distance,
    }
    plot = Plot("Attack", "share of rankings replaced", "distance moved", [Line("furthest", shares_tried, reached)])
    notes = ["An upper bound: more elaborate attacks may need less."]
    return Report("breakdown of a consensus", figures, plots=[plot], notes=notes)
