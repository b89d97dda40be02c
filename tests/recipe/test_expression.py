"""Arithmetic in a line: what it is worth, and what it may not say."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.recipe._expression import DEEPEST, LONGEST, evaluated, names_in
from weightsmith.weights import Weights

A, B = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 8.0])
KNOWN = {"a": Weights.of({"w": A}), "b": Weights.of({"w": B}), "c": Weights.of({"w": B, "v": A})}


def of(text: str) -> Weights:
    return evaluated(text, KNOWN.__getitem__)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", A),
        ("-a", -A),
        ("+a", A),
        ("a + b", A + B),
        ("a - b", A - B),
        ("b - a - a", B - A - A),
        ("b - (a - a)", B),
        ("2 * a", 2 * A),
        ("a * b", A * B),
        ("b / 4", B / 4),
        ("1 / b", 1 / B),
        ("b / a", B / A),
        ("a + 0.5 * (b - a)", A + 0.5 * (B - A)),
        ("a + -0.5 * b", A - 0.5 * B),
        (" a # a remark", A),
        ("a * (1 + 2) / 3", A),
    ],
)
def test_what_it_is_worth(text: str, expected: torch.Tensor):
    torch.testing.assert_close(of(text)["w"], expected)


def test_overlay():
    found = of("a | c")
    assert list(found) == ["w", "v"]
    assert torch.equal(found["w"], B)
    assert torch.equal(of("c | a")["w"], A)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 + 2", "is a number, not weights"),
        ("a / 0", "divides by zero"),
        ("a / 0.0", "divides by zero"),
        ("a / (1 - 1)", "divides by zero"),
        ("1 / 0 * a", "divides by zero"),
        ("a | 1", "lays weights over weights"),
        ("1 | a", "lays weights over weights"),
        ("a * 1e999", "too large"),
        (f"a * 1{'0' * 400}", "too large"),
        ("a * 1e300 * 1e300 * 1", None),
        ("a ** 2", "not understood"),
        ("a // 2", "not understood"),
        ("a @ b", "not understood"),
        ("not a", "not understood"),
        ("~a", "not understood"),
        ("True * a", "not understood"),
        ("a * 1j", "not understood"),
        ("'x' + a", "not understood"),
        ("a if b else c", "not understood"),
        ("a < b", "not understood"),
        ("a and b", "not understood"),
        ("a[0]", "not understood"),
        ("a.w", "not understood"),
        ("[a, b]", "not understood"),
        ("(lambda: a)()", "not understood"),
        ("__import__('os')", "not understood"),
        ("(a := b)", "not understood"),
        ("a +", "cannot be read"),
        ("a b", "cannot be read"),
        ("a + if", "cannot be read"),
        ("a = b", "cannot be read"),
        ("a\0", "cannot be read"),
        ("(" * 400 + "a" + ")" * 400, "cannot be read"),
        ("-" * (DEEPEST + 100) + "a", "operations within one another"),
        ("a" + " + a" * (DEEPEST + 10), "operations within one another"),
        ("a" + " " * LONGEST, "characters is too long"),
    ],
)
def test_what_it_may_not_say(text: str, said: str | None):
    if said is None:
        assert isinstance(of(text), Weights)  # what overflows is the business of who writes it
        return
    with pytest.raises(Error) as caught:
        of(text)
    assert said in str(caught.value)


def test_as_deep_as_is_allowed():
    torch.testing.assert_close(of("-" * 98 + "a")["w"], A)


def test_names_stand_in_the_order_in_which_they_are_said():
    assert names_in("b + 0.5 * (a - b) | base") == ["b", "a", "base"]
    assert names_in("ab + a") == ["ab", "a"]
    assert names_in("1 + 2") == []
