"""Arcs between models, against loops written from the formulas on whole vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._spherical import karcher, multislerp, nuslerp, slerp

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def length(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def mixed(s: float, a: Vector, t: float, b: Vector) -> Vector:
    return [s * x + t * y for x, y in zip(a, b, strict=True)]


def arc_of(models: Tensor, t: float) -> Vector:
    first, second = vectors(models)
    return arc(first, second, t)


def arc(a: Vector, b: Vector, t: float) -> Vector:
    angle = math.acos(dot(a, b) / (length(a) * length(b)))
    return mixed(math.sin((1 - t) * angle) / math.sin(angle), a, math.sin(t * angle) / math.sin(angle), b)


def vectors(models: Tensor) -> list[Vector]:
    return [model.double().flatten().tolist() for model in models]


def drawn(k: int, *shape: int, agree: float = 0.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return agree * torch.randn(shape, generator=generator) + torch.randn(k, *shape, generator=generator)


def check(found: Tensor, expected: Vector) -> None:
    torch.testing.assert_close(found.flatten().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


SHAPES = [(40,), (6, 7)]


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("agree", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_slerp_of_two(shape: tuple[int, ...], agree: float, t: float):
    models = drawn(2, *shape, agree=agree)
    check(slerp(models, t=t), arc_of(models, t))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_of_three_is_the_spherical_bezier_curve(t: float):
    models = drawn(3, 20)
    a, b, c = vectors(models)
    check(slerp(models, t=t), arc(arc(a, b, t), arc(b, c, t), t))


def test_slerp_keeps_the_length_and_goes_at_even_pace():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    for t in (0.1, 0.5, 0.8):
        point = slerp(torch.stack([a, b]), t=t)
        assert point.norm().item() == pytest.approx(3, rel=1e-6)
        assert math.atan2(point[1], point[0]) == pytest.approx(t * math.pi / 2, rel=1e-5)


def test_slerp_is_a_straight_line_above_the_threshold():
    models = torch.tensor([[1.0, 0.0], [math.cos(0.02), math.sin(0.02)]])  # cosine 0.9998
    line = 0.5 * models.sum(0)
    torch.testing.assert_close(slerp(models), line, rtol=1e-7, atol=0)
    exact = slerp(models, threshold=1)
    assert exact.double().norm().item() == pytest.approx(1, abs=1e-7)
    assert line.double().norm().item() < 1 - 4e-5
    wide = torch.tensor([[1.0, 0.0], [math.cos(0.04), math.sin(0.04)]])  # cosine 0.9992
    assert slerp(wide).double().norm().item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("threshold", [0.9995, 1.0])
def test_opposed_and_equal_tensors_are_joined_by_a_line(threshold: float):
    a = torch.tensor([1.0, -2.0, 0.1])
    torch.testing.assert_close(slerp(torch.stack([a, -3 * a]), t=0.25, threshold=threshold), 0 * a, rtol=0, atol=1e-7)
    torch.testing.assert_close(slerp(torch.stack([a, 3 * a]), t=0.25, threshold=threshold), 1.5 * a)


@pytest.mark.parametrize("method", [slerp, nuslerp])
def test_a_tensor_of_zeros_is_met_on_the_line(method: Callable[..., Tensor]):
    a = torch.tensor([1.0, -2.0])
    assert torch.equal(method(torch.stack([0 * a, a])), a / 2)
    assert torch.equal(method(torch.stack([a, 0 * a])), a / 2)
    assert torch.equal(method(torch.zeros(2, 3)), torch.zeros(3))


@pytest.mark.parametrize("weight", [[1, 1], [0.2, 1.5], [1, 0], [0, 1], [3, -1]])
@pytest.mark.parametrize("shape", SHAPES)
def test_nuslerp_of_two_is_slerp_at_the_share(shape: tuple[int, ...], weight: list[float]):
    models = drawn(2, *shape)
    check(nuslerp(models, weight=weight), arc_of(models, weight[1] / sum(weight)))


def test_nuslerp_of_three_takes_each_by_its_share_so_far():
    models = drawn(3, 20)
    a, b, c = vectors(models)
    check(nuslerp(models, weight=[1, 2, 5]), arc(arc(a, b, 2 / 3), c, 5 / 8))
    check(nuslerp(models), arc(arc(a, b, 1 / 2), c, 1 / 3))
    check(nuslerp(models, weight=[0, 0, 1]), c)


def test_nuslerp_stays_on_the_arc_where_slerp_takes_the_line():
    models = torch.tensor([[1.0, 0.0], [math.cos(0.02), math.sin(0.02)]])
    assert nuslerp(models).double().norm().item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("weight", [None, [1, 1, 1], [0.2, 1.5, 0.7], [1, -0.3, 0]])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(normalize: bool, weight: list[float] | None):
    models = drawn(3, 6, 7)
    given = weight or [1.0, 1.0, 1.0]
    a = [x / sum(given) for x in given] if normalize else given
    several = vectors(models)
    m = [math.fsum(x * v[j] / length(v) for x, v in zip(a, several, strict=True)) for j in range(42)]
    mean_length = sum(x * length(v) for x, v in zip(a, several, strict=True))
    check(multislerp(models, weight=weight, normalize=normalize), [mean_length * x / length(m) for x in m])


def test_multislerp_of_directions_that_cancel_is_the_mean():
    a = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(multislerp(torch.stack([a, -3 * a])), -a)
    third = [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]]
    found = multislerp(torch.tensor(third) * torch.tensor([[2.0], [1.0], [1.0]]))
    torch.testing.assert_close(found, torch.tensor([1 / 3, 0.0]), rtol=1e-6, atol=1e-6)


def test_multislerp_gives_zeros_no_direction_but_a_length():
    found = multislerp(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("seed", range(3))
def test_karcher_is_the_point_where_the_angles_balance(seed: int):
    models = drawn(4, 12, agree=1, seed=seed).double() * torch.tensor([[1.0], [2.0], [0.5], [7.0]])
    found = karcher(models, max_iter=50, tol=1e-7)
    assert found.norm().item() == pytest.approx(models.norm(dim=1).mean().item(), rel=1e-9)
    u, units = found / found.norm(), models / models.norm(dim=1, keepdim=True)
    tangents = []
    for unit in units:
        cosine = float(u @ unit)
        away = unit - cosine * u
        tangents.append(math.acos(cosine) * away / away.norm())
    assert torch.stack(tangents).mean(0).norm().item() < 1e-6

    def cost(point: Tensor) -> float:
        return sum(math.acos(float(point @ unit)) ** 2 for unit in units)

    for _ in range(20):
        beside = u + 0.01 * torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert cost(u) < cost(beside / beside.norm())


def test_karcher_of_two_is_the_middle_of_the_arc():
    models = drawn(2, 9)
    models = models / models.norm(dim=1, keepdim=True)
    check(karcher(models), arc_of(models, 0.5))


def test_karcher_of_what_has_no_middle():
    a = torch.tensor([1.0, -2.0])
    assert torch.equal(karcher(torch.zeros(3, 2)), torch.zeros(2))
    torch.testing.assert_close(karcher(torch.stack([a, -a])), a)  # no direction is in the middle: the first
    torch.testing.assert_close(karcher(torch.stack([a, 0 * a])), a / 2)


def test_karcher_without_steps_is_the_mean_direction():
    models = drawn(3, 9)
    torch.testing.assert_close(karcher(models, max_iter=0), multislerp(models))
    assert not torch.allclose(karcher(models), multislerp(models))


def test_one_step_of_karcher():
    models = drawn(3, 9).double()
    units = models / models.norm(dim=1, keepdim=True)
    u = units.sum(0) / units.sum(0).norm()
    tangent = torch.zeros(9, dtype=torch.float64)
    for unit in units:
        angle = math.acos(float(u @ unit))
        tangent += angle / math.sin(angle) * (unit - float(u @ unit) * u) / 3
    step = tangent.norm()
    expected = (torch.cos(step) * u + torch.sin(step) * tangent / step) * models.norm(dim=1).mean()
    torch.testing.assert_close(karcher(models, max_iter=1), expected)


@pytest.mark.parametrize("method", [slerp, nuslerp, multislerp, karcher])
def test_very_small_and_very_large_weights(method: Callable[..., Tensor]):
    models = drawn(3, 50)
    expected = method(models)
    for size in (1e-30, 1e30):
        torch.testing.assert_close(method(models * size) / size, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [slerp, nuslerp, multislerp, karcher])
@pytest.mark.usefixtures("small_pieces")
def test_the_angle_is_that_of_the_whole_tensor_not_of_its_chunks(method: Callable[..., Tensor]):
    models = drawn(2, 400)
    models[:, 200:] = models[:1, 200:]  # one half is the same in both
    found = getattr(ws.merge, method.__name__)([{"w": model} for model in models])["w"]
    torch.testing.assert_close(found, method(models), rtol=1e-6, atol=1e-6)
    halves = torch.cat([method(models[:, :200]), method(models[:, 200:])])
    assert not torch.allclose(found, halves, rtol=1e-3)


def test_t_may_depend_on_the_depth():
    names = [f"layers.{i}.weight" for i in range(3)]
    first, second = ({name: model.clone() for name in names} for model in drawn(2, 8))
    found = ws.merge.slerp([first, second], t=ws.by_depth([0.0, 1.0]))
    for name, t in zip(names, (0.0, 0.5, 1.0), strict=True):
        torch.testing.assert_close(found[name], slerp(torch.stack([first[name], second[name]]), t=t))


def test_around_a_base_by_differences():
    """What the cards of nuslerp and multislerp advise."""
    base, *models = drawn(3, 8).split(1)
    origin = ws.Weights.of({"w": base})
    deltas = [ws.Weights.of({"w": model}) - origin for model in models]
    found = (origin + ws.merge.nuslerp(deltas, weight=[1, 3]))["w"]
    check(found - base, arc_of(torch.stack([model - base for model in models]), 0.75))


def test_what_was_solved_is_used():
    models, solved = drawn(2, 5), torch.tensor([2.0, -1.0])
    for method in (slerp, nuslerp, multislerp, karcher):
        torch.testing.assert_close(method(models, solved=solved), 2 * models[0] - models[1])


def test_the_result_has_the_dtype_of_the_models():
    models = drawn(2, 5)
    for method in (slerp, nuslerp, multislerp, karcher):
        assert method(models.bfloat16()).dtype == torch.bfloat16
        assert method(models.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (slerp, {"t": float("nan")}, "slerp: t must be a finite number"),
        (slerp, {"threshold": 1.5}, "slerp: threshold is a cosine between 0 and 1, got 1.5"),
        (nuslerp, {"weight": [1, -1]}, "sum to zero"),
        (nuslerp, {"weight": [1]}, "weight needs one number for each of the 2 models, got 1"),
        (multislerp, {"weight": [1, -1]}, "sum to zero"),
        (karcher, {"max_iter": -1}, "karcher: max_iter must not be negative, got -1"),
        (karcher, {"tol": 0.0}, "karcher: tol must be positive"),
    ],
)
def test_options_are_refused_before_any_tensor_is_read(method: Any, options: dict[str, Any], message: str):
    models = drawn(2, 4)
    with pytest.raises(Error, match=message):
        method(models, **options)
    with pytest.raises(Error, match=message):
        getattr(ws.merge, method.__name__)([{"w": model} for model in models], **options)


def test_first_weights_that_cancel_are_refused():
    with pytest.raises(Error, match="put the models in another order"):
        nuslerp(drawn(3, 4), weight=[1, -1, 2])
    nuslerp(drawn(3, 4), weight=[2, 1, -1])


@pytest.mark.parametrize("method", [slerp, nuslerp])
def test_one_model_is_refused(method: Callable[..., Tensor]):
    with pytest.raises(Error, match=f"{method.__name__} needs at least 2 models, got 1"):
        method(torch.ones(1, 2))


@pytest.mark.parametrize("method", [multislerp, karcher])
def test_one_model_is_its_own_mean(method: Callable[..., Tensor]):
    torch.testing.assert_close(method(torch.tensor([[1.0, -2.0]])), torch.tensor([1.0, -2.0]))
    with pytest.raises(Error, match=f"{method.__name__} needs at least 1 model, got 0"):
        method(torch.ones(0, 2))


# Around a base, and of the parts of a tensor


@pytest.mark.parametrize("method", [nuslerp, multislerp])
def test_around_a_base_it_is_the_merge_of_the_task_vectors(method: Callable[..., Tensor]):
    models, base = drawn(3, 6, 7), drawn(1, 6, 7, seed=5)[0]
    for weight in ([1.0, 1.0, 1.0], [0.2, 1.5, 0.7]):
        expected = base + method(models - base, weight=weight)
        torch.testing.assert_close(method(models, base, weight=weight), expected)
    assert not torch.allclose(method(models, base), method(models), atol=1e-3)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
def test_nuslerp_of_rows_and_columns(row_wise: bool, with_base: bool):
    models, base = drawn(2, 5, 6), drawn(1, 5, 6, seed=5)[0]
    models[1, 2] = models[0, 2]  # one row the same in both: no angle
    models[:, :, 3] = base[:, 3]  # one column of zeros, seen from the base
    origin = base if with_base else torch.zeros_like(base)
    found = nuslerp(models, base if with_base else None, weight=[1, 3], flatten=False, row_wise=row_wise) - origin
    first, second = (models - origin).double().transpose(1, 2) if row_wise else (models - origin).double()
    for i, row in enumerate(found.T if row_wise else found):
        a, b = first[i].tolist(), second[i].tolist()
        same = a == b or not any(a) or not any(b)
        check(row, mixed(0.25, a, 0.75, b) if same else arc(a, b, 0.75))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", [(70,), (20, 9), (4, 5, 6), ()])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
def test_nuslerp_of_parts_streams(with_base: bool, row_wise: bool, shape: tuple[int, ...]):
    models, base = drawn(3, *shape), drawn(1, *shape, seed=5)[0]
    given: list[Any] = [models, *([base] if with_base else [])]
    expected = nuslerp(*given, weight=[1, 2, 3], flatten=False, row_wise=row_wise)
    named = [{"w": model} for model in models], {"w": base} if with_base else None
    found = ws.merge.nuslerp(*named, weight=[1, 2, 3], flatten=False, row_wise=row_wise)["w"]
    torch.testing.assert_close(found, expected)


def test_nuslerp_of_parts_refuses_what_the_whole_refuses():
    with pytest.raises(Error, match=r"the first weights of .* sum to zero; put the models in another order"):
        nuslerp(drawn(3, 4, 4), weight=[1, -1, 1], flatten=False)
