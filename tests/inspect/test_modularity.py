"""Modularity against its formula, and parts against every division of small graphs."""

from __future__ import annotations

import itertools

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import modularity
from weightsmith.inspect._modularity import _split


def score(adjacency, labels):
    """The formula, pair by pair."""
    total, degrees, n = adjacency.sum(), adjacency.sum(0), len(adjacency)
    pairs = ((i, j) for i in range(n) for j in range(n) if labels[i] == labels[j])
    return float(sum(adjacency[i, j] - degrees[i] * degrees[j] / total for i, j in pairs) / total)


def graph(n, seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(n, n, generator=generator, dtype=torch.float64).triu(1)
    upper *= torch.rand(n, n, generator=generator) < density
    return upper + upper.T


@pytest.mark.parametrize("seed", range(6))
def test_the_score_is_that_of_its_parts_and_nearly_the_best(seed):
    adjacency = graph(7, seed)
    found, labels = modularity(adjacency)
    assert found == pytest.approx(score(adjacency, labels.tolist()))
    best = max(score(adjacency, labels) for labels in itertools.product(range(3), repeat=7))
    assert found >= best - 0.06


def test_three_clear_parts_are_found():
    block = torch.ones(4, 4)
    adjacency = torch.block_diag(block, block, block) + 0.01
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found, labels = modularity(adjacency[order][:, order])
    assert len(labels.unique()) == 3
    assert len({tuple(sorted(order[labels == part].tolist())) for part in range(3)} & {(0, 1, 2, 3), (4, 5, 6, 7)}) == 2
    assert found == pytest.approx(2 / 3, abs=0.03)


def test_graphs_that_do_not_fall_apart():
    assert modularity(torch.zeros(3, 3))[0] == 0.0
    found, labels = modularity(torch.ones(5, 5))
    assert (abs(found) < 1e-12, labels.tolist()) == (True, [0] * 5)


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(2, 3),
        -torch.ones(2, 2),
        torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        torch.full((2, 2), torch.inf),
        torch.full((2, 2), torch.nan),
    ],
)
def test_what_is_no_graph_is_refused(bad):
    with pytest.raises(Error, match="modularity needs"):
        modularity(bad)


def gain(excess, sides):
    """What a division of a part adds to the modularity: what is inside the halves, less what was inside the part."""
    return float(excess[sides[:, None] == sides].sum() - excess.sum())


@pytest.mark.parametrize("scale", [1.0, 3.0])  # a part as loose as the rest, and one that holds together
@pytest.mark.parametrize("seed", range(6))
def test_a_division_of_a_part_adds_and_no_single_move_adds_more(seed, scale):
    adjacency = graph(14, seed, 0.4)
    adjacency[:9, :9] *= scale
    degrees, total = adjacency.sum(0), adjacency.sum()
    part = torch.arange(9)  # the rest of the graph counts for its degrees
    excess = ((adjacency - torch.outer(degrees, degrees) / total) / total)[part][:, part]
    every = [torch.tensor(signs) for signs in itertools.product((-1.0, 1.0), repeat=9)]
    best = max(gain(excess, sides) for sides in every)
    sides = _split(excess)
    reached = 0.0 if sides is None else gain(excess, sides)
    assert best - 0.03 <= reached <= best + 1e-12
    assert sides is None or reached > 0
    for node in range(9) if sides is not None else ():
        moved = sides.clone()
        moved[node] = -moved[node]
        assert gain(excess, moved) <= reached + 1e-9
