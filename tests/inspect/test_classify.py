"""Classifiers on examples: figures by hand, what was lost and gained, models left as they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from weightsmith.data import Examples
from weightsmith.errors import Error
from weightsmith.inspect._classify import classification

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def fixed(answers: list[int], sure: float = 2.0) -> nn.Module:
    """A model whose scores are ``sure`` for the answer and 0 else; its input is the number of the example."""
    table = torch.zeros(len(answers), 3)
    table[range(len(answers)), answers] = sure

    class Table(nn.Module):
        def forward(self, x):
            return table[x]

    return Table()


FIRST, SECOND = [0, 0, 1, 1, 1, 2, 2, 0], [0, 0, 0, 1, 0, 2, 0, 0]
DATA = (torch.arange(8), LABELS)


def test_figures_by_hand():
    found = classification({"a": fixed(FIRST), "b": fixed(SECOND)}, DATA, batch=3, samples=200)
    assert found["accuracy"] == [6 / 8, 5 / 8]
    # F1 by class: a: 2*2/(2*2+1+1), 2*2/(2*2+1), 2*2/(2*2+1); b: 2*3/(2*3+3), 2*1/(2*1+1), 2*1/(2*1+2)
    assert found["macro F1"] == pytest.approx([(4 / 6 + 4 / 5 + 4 / 5) / 3, (6 / 9 + 2 / 3 + 2 / 4) / 3])
    share = math.exp(2) / (math.exp(2) + 2)
    losses = [-(k * math.log(share) + (8 - k) * math.log((1 - share) / 2)) / 8 for k in (6, 5)]
    assert found["log loss"] == pytest.approx(losses, rel=1e-5)
    assert found["calibration error"] == pytest.approx([abs(share - 6 / 8), abs(share - 5 / 8)], rel=1e-5)
    assert found["lost"] == [None, 2 / 8]
    assert found["gained"] == [None, 1 / 8]
    assert found["the same"] == [None, 5 / 8]
    assert found["difference"] == [None, -1 / 8]
    assert found["p"][1] == 1.0  # two against one: nothing
    assert found["accuracy low"][0] < 6 / 8 < found["accuracy high"][0]


def test_the_same_counts_wrong_answers_too():
    same = sum(a == b for a, b in zip(FIRST, SECOND, strict=True)) / 8
    assert classification({"a": fixed(FIRST), "b": fixed(SECOND)}, DATA, samples=50)["the same"][1] == same


def test_the_reference_may_be_another():
    found = classification({"a": fixed(FIRST), "b": fixed(SECOND)}, DATA, "b", samples=50)
    assert found["difference"] == [1 / 8, None]
    assert found["gained"] == [2 / 8, None]
    with pytest.raises(Error, match="no model 'c'"):
        classification({"a": fixed(FIRST)}, DATA, "c")


def test_models_are_made_in_turn_and_left_as_they_were():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = []

    def make() -> nn.Module:
        made.append(1)
        return nn.Linear(2, 2)

    data = Examples("points", torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
    found = classification({"held": net, "made": make}, data, samples=50)
    assert made == [1]
    assert net.training
    assert net[0].training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert "examples" in found.table[0]
    assert found.title == "2 classifiers on points"


def test_outputs_with_logits_and_a_forward_of_ones_own():
    class Told:
        logits = torch.tensor([[1.0, 0.0]])

    class Model(nn.Module):
        def forward(self, x):
            return Told()

    one = (torch.zeros(1, 1), torch.tensor([0]))
    assert classification({"m": Model()}, one, samples=20)["accuracy"] == [1.0]
    turned = classification({"m": Model()}, one, samples=20, forward=lambda model, x: -model(x).logits)
    assert turned["accuracy"] == [0.0]


def test_scores_that_will_not_do():
    with pytest.raises(Error, match=r"m gives \[8\] for 8 examples"):
        classification({"m": nn.Identity()}, (torch.zeros(8), LABELS))
    with pytest.raises(Error, match="knows 2 classes, and examples has label 2"):
        classification({"m": nn.Identity()}, (torch.zeros(8, 2), LABELS))
    with pytest.raises(Error, match="at least one model"):
        classification({}, DATA)


def test_scores_that_are_no_numbers_have_no_loss():
    found = classification({"m": nn.Identity()}, (torch.full((8, 3), math.nan), LABELS), samples=20)
    assert found["log loss"] == [None]
    assert found.notes[-1] == "m gives scores that are not finite."
    with pytest.raises(Error, match="3 inputs and 8 labels"):
        classification({"m": nn.Identity()}, (torch.zeros(3, 3), LABELS))
