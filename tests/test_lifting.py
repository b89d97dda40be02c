"""From kernels to methods on whole checkpoints: the parts that all rooms share."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from weightsmith.card import card, card_of
from weightsmith.errors import Error
from weightsmith.lifting import (
    accepted,
    checked_options,
    dressed,
    example,
    options_of,
    per_tensor_options,
    sole,
    staged,
    tried,
)
from weightsmith.merge import lift
from weightsmith.weights import Held, Pass, Spec, Weights, by_depth, materialize


@card(paper="p")
def plain(weight: Tensor, *, amount: float = 1.0, density: float = 0.5, start: int = 0, solved: Any = None) -> Tensor:
    """Some of a weight."""
    return weight * amount


@card(paper="p")
def demanding(weight: Tensor, *, amount: float) -> Tensor:
    return weight * amount


def test_options_are_the_keywords_that_a_caller_may_give():
    assert options_of(plain) == {"amount": 1.0, "density": 0.5}
    assert options_of(demanding) == {"amount": inspect.Parameter.empty}


def test_unknown_and_missing_options():
    checked_options(plain, {"amount": 2})
    with pytest.raises(
        Error, match=r"^plain has no option 'densty' \(did you mean 'density'\?\); it has amount, density$"
    ):
        checked_options(plain, {"densty": 2})
    with pytest.raises(Error, match="plain has no option 'solved'; it has amount, density"):
        checked_options(plain, {"solved": 2})
    with pytest.raises(Error, match=r"demanding needs the option amount="):
        checked_options(demanding, {})

    @card(paper="p")
    def bare(weight: Tensor) -> Tensor:
        return weight

    with pytest.raises(Error, match="bare has no option 'x'; it has none"):
        checked_options(bare, {"x": 1})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [{}, {}, {}]),
        ({"amount": 3}, [{"amount": 3}] * 3),
        ({"amount": {"*.bias": 0, "*": 1}}, [{"amount": 1}, {"amount": 0}, {"amount": 1}]),
        ({"amount": lambda name: len(name)}, [{"amount": 10}, {"amount": 8}, {"amount": 10}]),
        ({"amount": by_depth([0, 10])}, [{"amount": 0}, {"amount": 0}, {"amount": 10}]),
        ({"amount": [1, {"2.*": 5, "*": 2}]}, [{"amount": [1, 2]}, {"amount": [1, 2]}, {"amount": [1, 5]}]),
        ({"amount": 1, "density": by_depth([0, 1])}, [{"amount": 1, "density": d} for d in (0, 0, 1)]),
    ],
)
def test_options_by_tensor(given: dict, expected: list[dict]):
    names = ["0.0.weight", "0.0.bias", "2.0.weight"]
    assert per_tensor_options(plain, given, names) == dict(zip(names, expected, strict=True))


def test_an_option_that_says_nothing_for_a_tensor():
    with pytest.raises(Error, match=r'density says nothing for the tensor b.*add "\*" for the rest'):
        per_tensor_options(plain, {"density": {"a": 1}}, ["a", "b"])


def test_every_different_set_of_options_is_tried_once():
    seen = []

    def kernel(weight: Tensor, *, amount: int) -> None:
        seen.append(amount)
        if amount == 3:
            raise Error("3 is too much")

    tried(kernel, [{"amount": n} for n in (1, 2, 1, 2)], example(2))
    assert seen == [1, 2]
    with pytest.raises(Error, match="3 is too much"):
        tried(kernel, [{"amount": 1}, {"amount": 3}], example(2))


def test_examples_are_harmless():
    values = example(3, 2, 2)
    assert values.shape == (3, 2, 2)
    assert values.isfinite().all()
    assert (values > 0).all()
    assert len(values.unique()) == 12


def test_accepted_options():
    def solve(statistics: Tensor, amount: float) -> Tensor: ...

    assert accepted(solve, {"amount": 1, "density": 2}) == {"amount": 1}


# Statistics first


def total(weight: Tensor) -> Tensor:
    return weight.sum()


def scaled_total(statistics: Tensor, amount: float = 1.0) -> Tensor:
    return statistics * amount


def twice(amount: float = 1.0) -> Generator[Pass, Any, Tensor]:
    """The mean, and then the squared distance from it by a second pass."""
    mean = yield Pass(lambda weight: torch.stack([weight.sum(), torch.tensor(float(weight.numel()))]))
    centre = mean[0] / mean[1]
    spread = yield Pass(lambda weight: (weight - centre).square().sum(), each=True)
    assert len(spread) > 1  # one a unit of work
    return torch.stack([centre, torch.stack(spread).sum()]) * amount


@card(paper="p", reduce=total, solve=scaled_total)
def share(weight: Tensor, *, amount: float = 1.0, power: int = 1, solved: Tensor | None = None) -> Tensor:
    whole = scaled_total(total(weight).double(), amount) if solved is None else solved
    return (weight / whole) ** power


@card(paper="p", solve=twice)
def standard(weight: Tensor, *, amount: float = 1.0, solved: Tensor | None = None) -> Tensor:
    assert solved is not None
    return (weight - solved[0]) / solved[1]


def streamed(kernel: Any, weight: Tensor, **options: Any) -> Tensor:
    spec = Spec(tuple(weight.shape), torch.float32)
    return materialize(sole(staged(kernel, [Held(weight)], options, {"": spec})))


@pytest.mark.usefixtures("small_pieces")
def test_statistics_are_those_of_the_whole_tensor():
    weight = torch.arange(1.0, 101).reshape(4, 25)
    torch.testing.assert_close(streamed(share, weight), weight / 5050)
    torch.testing.assert_close(streamed(share, weight, amount=2.0, power=2), (weight / 10100) ** 2)


@pytest.mark.usefixtures("small_pieces")
def test_a_solver_may_read_several_times():
    weight = torch.arange(1.0, 101).reshape(4, 25)
    torch.testing.assert_close(streamed(standard, weight), (weight - 50.5) / 83325)
    torch.testing.assert_close(streamed(standard, weight, amount=2.0), (weight - 101) / 166650)


def test_a_kernel_is_told_where_its_chunk_begins(small_pieces: None):
    @card(paper="p")
    def numbered(weight: Tensor, *, start: int = 0) -> Tensor:
        return weight + torch.arange(start, start + weight.numel())

    assert torch.equal(streamed(numbered, torch.zeros(10, 7)), torch.arange(70.0).reshape(10, 7))


def test_the_unit_of_the_card_is_kept_whole(small_pieces: None):
    @card(paper="p", unit="row")
    def by_rows(weight: Tensor) -> Tensor:
        assert weight.shape[1:] == (3, 2)
        return weight - weight.flatten(1).amax(1).reshape(-1, 1, 1)

    @card(paper="p", unit="tensor")
    def whole(weight: Tensor) -> Tensor:
        return weight - weight.max()

    weight = torch.arange(120.0).reshape(20, 3, 2)
    assert torch.equal(streamed(by_rows, weight), weight - weight.flatten(1).amax(1).reshape(-1, 1, 1))
    assert torch.equal(streamed(whole, weight), weight - 119)


def test_a_solve_without_its_reduce_is_a_mistake_of_the_author():
    @card(paper="p", solve=scaled_total)
    def lost(weight: Tensor, *, solved: Tensor | None = None) -> Tensor:
        return weight

    with pytest.raises(TypeError, match="the card of lost has solve= without reduce="):
        streamed(lost, torch.ones(3))


# What a user sees


def test_dressed():
    leading = [inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    public = dressed(lambda *args, **kwargs: None, plain, leading)
    assert list(inspect.signature(public).parameters) == ["models", "amount", "density"]
    assert (public.__name__, public.__qualname__, public.__doc__) == ("plain", "plain", "Some of a weight.")
    assert public.kernel is plain
    assert public.card is card_of(plain)


def test_an_option_that_the_room_takes_itself_is_shown_once():
    leading = [inspect.Parameter("amount", inspect.Parameter.KEYWORD_ONLY, default=7)]
    public = dressed(lambda **kwargs: None, plain, leading)
    assert inspect.signature(public).parameters["amount"].default == 7


def test_a_method_of_ones_own_is_lifted_like_those_of_the_house():
    @card(paper="p", reduce=lambda models: models.sum(), solve=lambda statistics: statistics)
    def whole_share(models: Tensor, *, solved: Tensor | None = None) -> Tensor:
        return models.sum(0) / (models.sum() if solved is None else solved)

    found = lift(whole_share)([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}])
    assert isinstance(found, Weights)
    torch.testing.assert_close(found["w"], torch.tensor([0.4, 0.6]))
