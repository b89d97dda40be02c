"""The steps that merging methods share."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.errors import Error
from weightsmith.merge._parts import at_least, combined, delta_gram, mean_pairwise_cosine, shares, wide
from weightsmith.weights import workspace


def test_at_least():
    at_least(2, torch.ones(2, 1), "ties")
    with pytest.raises(Error, match=r"^ties needs at least 2 models, got 1$"):
        at_least(2, torch.ones(1, 1), "ties")


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_normalized_shares_sum_to_one_in_the_given_proportion(weight: list[float]):
    found = shares(weight, len(weight), normalize=True)
    assert sum(found) == pytest.approx(1)
    assert [share * sum(weight) for share in found] == pytest.approx(weight)


def test_shares_of_one_number_and_without_normalizing():
    assert shares(None, 3, normalize=False) == [1, 1, 1]
    assert shares(2, 2, normalize=False) == [2, 2]
    assert shares([3, -1], 2, normalize=False) == [3, -1]
    assert shares([3, -1], 2, normalize=True) == [1.5, -0.5]
    assert shares(torch.tensor([1.0, 3.0]), 2, normalize=True) == [0.25, 0.75]  # type: ignore[arg-type]


def test_tiny_weights_are_no_zero_sum():
    assert shares([1e-30, 1e-30], 2, normalize=True) == [0.5, 0.5]


def test_combined_is_the_sum_and_leaves_the_models_alone():
    models = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert torch.equal(combined(models, [1, 10, 100]), torch.tensor([531.0, 642.0]))
    assert torch.equal(models, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))


def test_wide():
    half, single, double = (torch.ones(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    assert [t.dtype for t in wide(half)] == [torch.float32]
    assert [t.dtype for t in wide(half, single)] == [torch.float32] * 2
    assert [t.dtype for t in wide(half, double)] == [torch.float64] * 2


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 4)])
def test_delta_gram_holds_the_inner_products(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    models, base = torch.randn(3, *shape, generator=generator), torch.randn(shape, generator=generator)
    deltas = [(model - base).flatten().tolist() for model in models]
    by_hand = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in deltas] for a in deltas]
    torch.testing.assert_close(
        delta_gram(models, base), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


def test_delta_gram_adds_up_over_chunks():
    generator = torch.Generator().manual_seed(1)
    models, base = torch.randn(3, 100, generator=generator), torch.randn(100, generator=generator)
    parts = sum(delta_gram(models[:, i : i + 7], base[i : i + 7]) for i in range(0, 100, 7))
    torch.testing.assert_close(parts, delta_gram(models, base), rtol=1e-6, atol=1e-6)


def test_mean_pairwise_cosine_by_hand():
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(4) if i < j]
    cosines = [
        float(vectors[i] @ vectors[j]) / math.sqrt(float(vectors[i] @ vectors[i]) * float(vectors[j] @ vectors[j]))
        for i, j in pairs
    ]
    assert float(mean_pairwise_cosine(vectors @ vectors.T)) == pytest.approx(sum(cosines) / 6)


def test_a_vector_of_no_length_counts_as_a_right_angle():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert float(mean_pairwise_cosine(vectors @ vectors.T)) == pytest.approx(1 / 3)
    assert float(mean_pairwise_cosine(torch.zeros(3, 3, dtype=torch.float64))) == 0


def test_cosines_do_not_leave_their_range_by_rounding():
    vector = torch.full((1, 3), 0.1, dtype=torch.float64)
    same = vector.expand(5, 3)
    assert float(mean_pairwise_cosine(same @ same.T)) <= 1
    opposed = torch.cat([vector, -vector])
    assert float(mean_pairwise_cosine(opposed @ opposed.T)) >= -1


def test_a_workspace_is_one_place_a_thread_and_dtype():
    cpu = torch.device("cpu")
    first = workspace((3, 4), torch.float32, cpu)
    again = workspace((2, 5), torch.float32, cpu)
    assert first.shape == (3, 4)
    assert again.data_ptr() == first.data_ptr()
    assert workspace((3,), torch.float64, cpu).data_ptr() != first.data_ptr()
    places = []
    thread = threading.Thread(target=lambda: places.append(workspace((3, 4), torch.float32, cpu).data_ptr()))
    thread.start()
    thread.join()
    assert places != [first.data_ptr()]
    large = workspace((2**22,), torch.float32, cpu)
    assert large.data_ptr() != workspace((2**22,), torch.float32, cpu).data_ptr()
