"""Dense memories: energies by hand, couplings, and what they hold."""

from __future__ import annotations

import itertools

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.theory import hebbian_couplings, hebbian_patterns, retrieval_diagram, retrieve
from weightsmith.inspect.theory._dense_memory import _field


def signs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.where(torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_fields_are_energy_differences(order: int):
    stored, shares, state = signs(5, 9).double(), torch.rand(5).double(), signs(3, 9, seed=1).double()
    stored[0] *= 0.3  # not only signs
    found = _field(stored, shares, state, order)

    def energy(s: torch.Tensor) -> float:
        return float(-9 * (shares * (stored @ s / 9) ** order).sum())

    for b, i in itertools.product(range(3), range(9)):
        up, down = state[b].clone(), state[b].clone()
        up[i], down[i] = 1, -1
        assert float(found[b, i]) == pytest.approx((energy(down) - energy(up)) / 2, abs=1e-9)


def test_couplings_give_the_update_of_order_two():
    stored, state = signs(4, 20), signs(6, 20, seed=1)
    couplings = hebbian_couplings(stored)
    torch.testing.assert_close(_field(stored, torch.ones(4), state, 2), 2 * state @ couplings)
    assert float(couplings.diagonal().abs().max()) == 0
    weighted = hebbian_couplings(stored, torch.tensor([0.0, 0.0, 0.0, 2.0]))
    torch.testing.assert_close(weighted, 2 * hebbian_couplings(stored[3:]))


def test_patterns_with_and_without_a_teacher():
    seen = signs(3, 50, 40)
    vectors, weights = hebbian_patterns(seen)
    torch.testing.assert_close(vectors.square().mean(1), torch.ones(3))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(vectors, seen.mean(1)), torch.ones(3))
    assert weights.tolist() == [1, 1, 1]
    each, shares = hebbian_patterns(seen, supervised=False)
    assert each.shape == (150, 40)
    assert float(shares.sum()) == pytest.approx(3)


def test_capacity_grows_with_the_order():
    held = {order: retrieval_diagram(order, patterns=(40, 500), temperatures=(0.0,))["overlap"] for order in (2, 4)}
    assert held[2][0] < 0.8
    assert held[4][0] == 1
    assert held[4][1] > 0.85


def test_a_teacher_and_noise():
    kind = {"units": 100, "patterns": (10,), "temperatures": (0.0, 20.0), "quality": 0.3, "examples": 40}
    taught, untaught = (retrieval_diagram(4, supervised=given, **kind)["overlap"] for given in (True, False))
    assert taught[0] > untaught[0] + 0.1
    assert taught[0] > 0.9
    assert abs(taught[1]) < 0.12  # nothing is left in the heat


def test_retrieve_stops_and_repeats():
    stored = signs(2, 30)
    assert torch.equal(retrieve(stored, stored, order=4), stored)
    start = signs(3, 30, seed=2)
    noisy = [retrieve(stored, start, order=2, temperature=1.0, seed=5) for _ in range(2)]
    assert torch.equal(*noisy)
    assert retrieve(stored.bfloat16(), start.bfloat16()).dtype == torch.float32
    # A temperature close to none is none.
    assert torch.equal(retrieve(stored, start, order=3, temperature=1e-6), retrieve(stored, start, order=3))


def test_refusals():
    with pytest.raises(Error, match="do not fit"):
        retrieve(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(Error, match="order"):
        retrieve(torch.ones(2, 3), torch.ones(2, 3), order=1)
    with pytest.raises(Error, match="whole order"):
        retrieve(torch.ones(2, 3), torch.ones(2, 3), order=2.5)  # type: ignore[arg-type]
    with pytest.raises(Error, match="patterns"):
        hebbian_patterns(torch.ones(2, 3))
    with pytest.raises(Error, match="count, units"):
        hebbian_couplings(torch.ones(2))
    with pytest.raises(Error, match="quality"):
        retrieval_diagram(2, quality=0)
    with pytest.raises(Error, match="needs patterns"):
        retrieval_diagram(2, patterns=())


@pytest.mark.parametrize("order", [2, 3])
def test_noisy_updates_have_their_chances(order: int):
    stored, start = signs(3, 6), signs(1, 6, seed=4)
    reached = retrieve(stored, start.expand(20_000, -1), order=order, temperature=0.7, steps=1)
    expected = torch.tanh(_field(stored, torch.ones(3), start, order)[0] / 0.7)
    torch.testing.assert_close(reached.mean(dim=0), expected, atol=0.03, rtol=0)


def test_fields_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch):
    stored, shares, state = signs(11, 9), torch.rand(11), signs(5, 9, seed=1)
    one = _field(stored, shares, state, 4)
    for at_once in (9, 40, 200):
        monkeypatch.setattr("weightsmith.inspect.theory._dense_memory._AT_ONCE", at_once)
        torch.testing.assert_close(_field(stored, shares, state, 4), one)
