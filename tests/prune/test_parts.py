"""Forms of Gram matrices."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.prune._parts import full_gram, input_energy


def test_all_forms_tell_the_same_energies():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    gram = rows.T @ rows
    blocks = torch.stack([gram[:2, :2], gram[2:, 2:]])
    for form in (gram, gram.diagonal(), blocks):
        torch.testing.assert_close(input_energy(form), rows.square().sum(0))
    expected = gram.clone()
    expected[:2, 2:] = expected[2:, :2] = 0
    assert torch.equal(full_gram(blocks, 4, "x"), expected)
    assert torch.equal(full_gram(gram, 4, "x"), gram)


def test_a_diagonal_does_not_say_how_inputs_go_together():
    with pytest.raises(Error, match="x needs how inputs go together"):
        full_gram(torch.ones(4), 4, "x")


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_energies_are_finite_and_not_negative(bad: float):
    with pytest.raises(Error, match="input 1 has the sum of squares"):
        input_energy(torch.tensor([1.0, bad]))
