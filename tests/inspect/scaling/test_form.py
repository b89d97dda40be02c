"""Forms: constants there and back, grids of starts, fixed constants, and forms of one's own."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import scaling
from weightsmith.inspect.scaling import FORMS, Form


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_whole(name):
    form = FORMS[name]
    assert form.about
    middle = {parameter: sorted(values)[len(values) // 2] for parameter, values in form.starts.items()}
    raw = torch.tensor([form.raw(middle)], dtype=torch.float64)
    for parameter, value in middle.items():
        assert form.natural(raw, parameter).item() == pytest.approx(value)
    columns = {column: torch.tensor([3.0, 4.0], dtype=torch.float64) for column in form.columns}
    assert form.predict(raw, columns).shape == (1, 2)
    assert len(form.grid({})) == math.prod(len(values) for values in form.starts.values())


def test_free_constants_may_be_negative_and_others_not():
    assert FORMS["performance"].raw(dict.fromkeys(("w1", "w2", "w3", "w4", "b"), -1.0)) == [-1.0] * 5
    with pytest.raises(Error, match="alpha_N must be above 0"):
        FORMS["kaplan-size"].raw({"Nc": 1.0, "alpha_N": -1.0})
    with pytest.raises(Error, match="has the parameters Nc, alpha_N"):
        scaling.given("kaplan-size", Nc=1.0)


def test_a_fixed_constant_may_be_zero_and_stays():
    form = FORMS["step-time"]
    grid = form.grid({"per_flop": 0.0})
    assert len(grid) == 3 * 4
    columns = {"bytes": torch.tensor([2.0]).double(), "flops": torch.tensor([1e9]).double()}
    told = form.predict(torch.zeros(1, 3, dtype=torch.float64), columns, {"per_flop": 0.0})
    assert told.tolist() == [[3.0]]


def test_a_law_of_ones_own():
    def decay(t, top, rate):
        return top * (-rate * t).exp()

    mine = Form("decay", decay, ("t",), {"top": (1.0, 10.0), "rate": (0.01, 1.0)}, target="height")
    runs = scaling.simulate(mine, {"top": 5.0, "rate": 0.3}, {"t": [1.0, 2.0, 3.0, 5.0, 8.0]}, noise=0.0)
    law = scaling.fit(runs, mine, bootstrap=0)
    assert law.parameters == pytest.approx({"top": 5.0, "rate": 0.3})
