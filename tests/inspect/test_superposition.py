"""The toy model: its data, its decay, and that it learns what can be learned."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import superposition
from weightsmith.inspect._superposition import _examples, _loss, _schedule


def test_examples_have_their_frequencies_and_values():
    frequencies = torch.tensor([0.5, 0.1, 0.01])
    examples = _examples(frequencies, 200_000, torch.Generator().manual_seed(0))
    active = examples > 0
    torch.testing.assert_close(active.float().mean(0), frequencies, rtol=0.1, atol=0.001)
    values = examples[:, 0][active[:, 0]]
    assert float(values.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(values.var()) == pytest.approx(4 / 12, rel=0.02)
    assert float(values.max()) <= 2


def test_the_loss_by_hand():
    matrix, bias = torch.tensor([[1.0], [-0.5]]), torch.tensor([0.25, 0.0])
    # x = (2, 0): hidden 2; outputs relu(2.25), relu(-1); errors 0.25, 0
    assert float(_loss(matrix, bias, torch.tensor([[2.0, 0.0]]))) == pytest.approx(0.0625 / 2)


def test_frequencies_fall_like_the_power():
    found = superposition(2, features=4, exponent=2.0, active=0.5, steps=1, batch=1)
    powers = torch.tensor([1.0, 1 / 4, 1 / 9, 1 / 16])
    torch.testing.assert_close(found.frequencies, 0.5 * powers / powers.sum())


def test_the_sign_of_the_decay_decides_who_is_represented():
    options = {"features": 64, "exponent": 1.5, "steps": 400, "batch": 128}
    strong, weak = superposition(4, decay=-1.0, **options), superposition(4, decay=1.0, **options)
    assert strong.represented == 1.0
    assert 0.6 < float(strong.matrix.norm(dim=1).mean()) < 1.2
    assert weak.represented < 0.3
    assert weak.matrix.norm(dim=1)[:3].mean() > 3 * weak.matrix.norm(dim=1)[32:].mean()
    assert strong.curve[-1] < strong.curve[0] / 3
    assert strong.loss == pytest.approx(sum(strong.curve[-20:]) / 20, rel=0.5)


def test_with_room_for_all_the_loss_goes():
    tight = superposition(2, features=16, decay=0.0, steps=500, batch=128)
    roomy = superposition(16, features=16, decay=0.0, steps=500, batch=128)
    assert roomy.loss < tight.loss / 20


def test_it_repeats_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    one, other = (superposition(3, features=8, steps=10, batch=8, seed=5) for _ in range(2))
    assert torch.equal(one.matrix, other.matrix)
    assert one.loss == other.loss
    assert torch.equal(before, torch.get_rng_state())


def test_report_and_refusals(tmp_path):
    pytest.importorskip("matplotlib")
    found = superposition(3, features=8, steps=10, batch=8)
    report = found.report()
    assert report.figures["width"] == 3
    assert len(report.table) == len(found.to_json()["features"]) == 8
    assert report.save(tmp_path / "r.html").exists()
    assert _schedule(0.5) < _schedule(0.1) <= 1
    for options in ({"width": 0}, {"width": 2, "steps": 0}, {"width": 2, "active": 0.0}):
        with pytest.raises(Error, match="counts of 1"):
            superposition(**options)
    with pytest.raises(Error, match="lower active"):
        superposition(2, features=4, active=4.0)
