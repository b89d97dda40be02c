"""The table of laws: each formula takes exactly the columns and constants that its row names."""

from __future__ import annotations

import inspect

import pytest

from weightsmith.card import card_of
from weightsmith.inspect.scaling import METHODS
from weightsmith.inspect.scaling._forms import FORMS


@pytest.mark.parametrize("name", FORMS)
def test_rows_fit_their_formulas(name):
    form = FORMS[name]
    assert tuple(inspect.signature(form.formula).parameters) == (*form.columns, *form.names)
    assert METHODS[form.formula.__name__] is form.formula
    assert card_of(form.formula).covers
    assert set(form.free) <= set(form.names)
    assert set(form.defaults) | set(form.signed) <= set(form.columns)
