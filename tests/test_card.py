"""Cards and tables."""

from __future__ import annotations

import dataclasses

import pytest

from weightsmith.card import NEEDS, UNITS, Card, card, card_of, table


def test_the_function_comes_back_unchanged():
    def halve(weight: float) -> float:
        return weight / 2

    worn = card(paper="Nobody 2020, 'Halves'", laws=("scale",))(halve)
    assert worn is halve
    assert halve(4) == 2
    assert card_of(halve) == Card(paper="Nobody 2020, 'Halves'", laws=("scale",))


def test_what_a_card_says_when_nothing_is_said():
    made = Card(paper="p")
    assert (made.covers, made.needs, made.unit, made.reduce, made.solve, made.laws) == (
        (),
        (),
        "element",
        None,
        None,
        (),
    )


def test_a_card_is_not_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Card(paper="p").paper = "q"  # type: ignore[misc]


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("unit", UNITS)
def test_all_words_are_known(need: str, unit: str):
    assert card(paper="p", needs=(need,), unit=unit)(lambda: None).card.needs == (need,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "word"), [({"needs": ("base", "luck")}, "luck"), ({"unit": "column"}, "column"), ({"law": ()}, "law")]
)
def test_words_that_no_card_knows(fields: dict, word: str):
    with pytest.raises(TypeError, match=word):
        card(paper="p", **fields)


def test_a_function_without_a_card():
    with pytest.raises(AttributeError, match="card"):
        card_of(lambda: None)


def test_a_table_has_names_in_the_order_given():
    def b(): ...

    def a(): ...

    assert list(table(b, a).items()) == [("b", b), ("a", a)]
    with pytest.raises(TypeError, match="two methods of a room have one name"):
        table(a, b, a)
