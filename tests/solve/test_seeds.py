"""Random numbers by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightsmith.solve import generator_for, random_bits, seed_for, uniform


def drawn(seed: int, *words: object) -> torch.Tensor:
    return torch.rand(4, generator=generator_for(seed, *words))


def test_numbers_depend_on_seed_and_words_alone():
    state = torch.get_rng_state()
    assert torch.equal(drawn(1, "a"), drawn(1, "a"))
    assert torch.equal(state, torch.get_rng_state())
    others = [(1, "b"), (2, "a"), (1,), (1, "a", 0), (1, "a", 1), (12, "a"), (1, "2a"), (1, "a", "b"), (1, "ab")]
    found = {tuple(drawn(seed, *words).tolist()) for seed, *words in [(1, "a"), *others]}
    assert len(found) == 10


def test_seeds_are_those_that_a_generator_takes_and_stay():
    seeds = [seed_for(0, number) for number in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60
    assert generator_for(0, "a").initial_seed() == seed_for(0, "a")
    assert seed_for(0, "a") == 7635241192072670218  # results that were kept rest on it


@pytest.mark.parametrize("start", [0, 1, 2, 7, 2**14 - 1, 2**15 + 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 2**15 + 1])
def test_a_row_of_numbers_may_be_cut_anywhere(start: int, count: int):
    whole = uniform(2**16 + 10, start=0, seed=3, key="w")
    assert torch.equal(uniform(count, start=start, seed=3, key="w"), whole[start : start + count])


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_pieces_of_bits_follow_one_another(width: int):
    def row(start: int, count: int) -> np.ndarray:
        found, at = np.zeros(count, dtype=f"u{width // 8}"), 0
        for place, bits in random_bits(count, start, 0, "w", width):
            assert place == at
            found[place : place + len(bits)] = bits
            at += len(bits)
        assert at == count
        return found

    assert np.array_equal(row(11, 300), row(0, 400)[11:311])


def test_rows_differ_by_seed_and_key_and_stay_what_they_are():
    rows = [uniform(1000, start=0, seed=seed, key=key) for seed, key in ((0, ""), (1, ""), (0, "a"), (0, "b"))]
    for place, one in enumerate(rows):
        assert abs(float(one.mean()) - 0.5) < 0.05
        assert abs(float(one.std()) - 12**-0.5) < 0.03
        assert 0 <= float(one.min()) <= float(one.max()) < 1
        for other in rows[:place]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.15
    assert rows[0][:4].tolist() == pytest.approx([0.5913, 0.5440, 0.3134, 0.8199], abs=5e-5)  # masks that were kept
