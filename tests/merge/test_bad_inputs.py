"""What every merge does with models that do not fit, or hold what no arithmetic survives.

For each case either an error that names the tensor and whose it was, before anything is written, or a finite
result with a stated property. Every lifted method goes through every case.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge.room import example_statistics

METHODS = {name: method for name, method in ws.merge.METHODS.items() if hasattr(method, "kernel")}
BASELESS = {"mean", "slerp", "karcher", "fisher", "regmean"}
"""Take a base for tensors without floats only."""
SOLE = {"passthrough"}
"""Takes one model."""
PAIRS = {"model_stock", "slerp", "nuslerp"}
"""Need two models at least."""
SEVERAL = sorted(METHODS.keys() - SOLE)

Checkpoint = dict[str, Tensor]


def checkpoint(seed: int, base: Checkpoint | None = None) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.w": (4, 6), "layers.1.w": (4, 6), "norm": (6,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return drawn if base is None else {name: base[name] + 0.1 * drawn[name] for name in drawn}


BASE = checkpoint(0)
A, B = checkpoint(1, BASE), checkpoint(2, BASE)


def merged(name: str, models: list[Checkpoint], base: Checkpoint, **options: Any) -> ws.Weights:
    """A merge with all that the method needs; statistics speak of what all have."""
    method: Any = METHODS[name]
    models = models[:1] if name in SOLE else models
    statistic = next((need for need in method.card.needs if need.startswith("stats.")), None)
    if statistic:
        parties = [*models, *([base] if "base" in method.card.needs else [])]
        shapes = [{(key, value.shape) for key, value in one.items()} for one in parties]
        alike = {key for key, _ in set.intersection(*shapes)} if shapes else set()
        options["stats"] = [told(statistic, {k: v for k, v in one.items() if k in alike}) for one in parties]
    given = {} if name in BASELESS | SOLE else {"base": base}
    assert bool(given) <= ("base" in method.card.needs or "base" in inspect.signature(method.kernel).parameters)
    return method(models, **given, **options)


def told(statistic: str, model: Checkpoint) -> Checkpoint:
    found = {}
    for name, value in model.items():
        if value.is_floating_point() and value.dim():
            one = example_statistics(statistic, 1, tuple(value.shape))
            if one is not None:
                found[name] = one[0]
    return found


def all_finite(weights: ws.Weights) -> bool:
    return all(bool(weights[name].isfinite().all()) for name in weights)


def equal(weights: ws.Weights, expected: Checkpoint, tolerance: float = 1e-5) -> bool:
    return list(weights) == list(expected) and all(
        torch.allclose(weights[name].double(), expected[name].double(), rtol=0, atol=tolerance) for name in expected
    )


def like(model: Checkpoint, value: float, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return {name: torch.full_like(tensor, value, dtype=dtype) for name, tensor in model.items()}


every = pytest.mark.parametrize("name", sorted(METHODS))
several = pytest.mark.parametrize("name", SEVERAL)


def test_the_groups_name_methods_that_there_are():
    assert METHODS.keys() >= BASELESS | SOLE | PAIRS
    assert len(METHODS) >= 24


# Other tensors


@several
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({name: B[name] for name in ("layers.0.w", "norm")}, ["model 2", "lacks layers.1.w"]),
        (B | {"more": torch.ones(3)}, ["model 2", "lacks more"]),
        (B | {"norm": torch.ones(7)}, ["model 2", "norm [6] against [7]"]),
        (B | {"norm": torch.ones(6, 1)}, ["model 2", "norm [6] against [6, 1]"]),
        (B | {"norm": torch.ones(6, dtype=torch.int64)}, ["model 2", "norm float32 against int64"]),
        ({"other": torch.ones(3)}, ["model 2", "lacks layers.0.w, layers.1.w, norm"]),
    ],
    ids=["missing", "extra", "shape", "rank", "integers", "another architecture"],
)
def test_models_that_differ_are_refused_by_name(name: str, other: Checkpoint, said: list[str]):
    with pytest.raises(Error) as caught:
        merged(name, [A, other], BASE)
    assert name in str(caught.value)
    for words in said:
        assert words in str(caught.value)


@several
def test_rest_says_what_becomes_of_them(name: str):
    longer = A | {"embed.weight": torch.ones(5, 2), "head": torch.ones(3)}
    other = B | {"embed.weight": torch.ones(7, 2)}
    found = merged(name, [longer, other], BASE, rest="first")
    assert torch.equal(found["embed.weight"], longer["embed.weight"])
    assert torch.equal(found["head"], longer["head"])
    alone = merged(name, [A, B], BASE)
    assert all(torch.equal(found[key], alone[key]) for key in A)
    assert list(merged(name, [longer, other], BASE, rest="drop")) == list(A)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - BASELESS - SOLE))
@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({name: BASE[name] for name in ("layers.0.w", "layers.1.w")}, "the base must have the same tensors"),
        (BASE | {"norm": torch.ones(7)}, "norm [6] against [7]"),
    ],
    ids=["missing", "shape"],
)
def test_a_base_that_differs_is_refused(name: str, base: Checkpoint, said: str):
    with pytest.raises(Error, match="the base") as caught:
        merged(name, [A, B], base)
    assert said in str(caught.value)
    assert "norm" in str(caught.value)


@several
def test_one_tied_and_one_not_come_apart(name: str):
    """A checkpoint whose head is its embedding stores it once, and its configuration says so."""

    def model(own: Checkpoint, tied: bool) -> ws.Weights:
        tensors = own | {"embed_tokens.weight": own["layers.0.w"] + 1}
        tensors |= {} if tied else {"lm_head.weight": own["layers.0.w"] - 1}
        return ws.open(tensors).with_files({"config.json": json.dumps({"tie_word_embeddings": tied}).encode()})

    options: dict[str, Any] = {}
    method: Any = METHODS[name]
    statistic = next((need for need in method.card.needs if need.startswith("stats.")), None)
    models = [model(A, False), model(B, True)]
    base = model(BASE, False)
    if statistic:
        parties = [A, B, *([BASE] if "base" in method.card.needs else [])]
        options["stats"] = [told(statistic, p | {"lm_head.weight": p["layers.0.w"]}) for p in parties]
        if statistic != "stats.gram":
            options["stats"] = [one | {"embed_tokens.weight": one["layers.0.w"]} for one in options["stats"]]
    found = method(models, **({} if name in BASELESS else {"base": base}), **options)
    assert "lm_head.weight" in found
    assert not found.ties
    assert all_finite(found)
    assert json.loads(bytes(found.files["config.json"]))["tie_word_embeddings"] is False  # type: ignore[arg-type]


# Numbers that are none


@every
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused_before_anything_is_there(name: str, wrong: float, tmp_path: Path):
    spoilt = A | {"layers.0.w": A["layers.0.w"].clone()}
    spoilt["layers.0.w"][1, 2] = wrong
    found = merged(name, [spoilt, B], BASE)
    with pytest.raises(Error, match=r"tensor layers\.0\.w: the merge gives .* because model 1 holds"):
        found.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    allowed = merged(name, [spoilt, B], BASE, nonfinite="allow")
    assert not allowed["layers.0.w"].isfinite().all()
    assert allowed["layers.1.w"].isfinite().all()


@every
def test_a_base_with_nan(name: str):
    spoilt = BASE | {"layers.0.w": BASE["layers.0.w"].clone()}
    spoilt["layers.0.w"][1, 2] = float("nan")
    found = merged(name, [A, B], spoilt)
    if name in BASELESS | SOLE:
        assert all_finite(found)
        return
    with pytest.raises(Error, match=r"tensor layers\.0\.w: the merge gives nan .* because the base holds"):
        found["layers.0.w"]
    assert found["layers.1.w"].isfinite().all()


# Few, equal, opposed


@every
def test_no_model(name: str):
    with pytest.raises(Error, match=rf"{name} needs at least 1 model, got 0"):
        merged(name, [], BASE)


@every
def test_one_model(name: str):
    if name in PAIRS:
        with pytest.raises(Error, match=rf"{name} needs at least 2 models, got 1"):
            merged(name, [A], BASE)
        return
    assert all_finite(merged(name, [A], BASE))


def test_two_models_where_one_is_taken():
    with pytest.raises(Error, match="needs exactly 1 model, got 2"):
        ws.merge.passthrough([A, B])


KEEPS_WHAT_ALL_SAY = {"mean", "slerp", "nuslerp", "multislerp", "karcher", "fisher", "regmean", "passthrough"}


@every
def test_identical_models(name: str):
    """A mean of equal ones is that one; a sum of their changes is not, and neither is a part of them."""
    found = merged(name, [A, dict(A)], BASE)
    assert all_finite(found)
    if name in KEEPS_WHAT_ALL_SAY:
        assert equal(found, A)


@every
def test_models_that_are_the_base_give_the_base(name: str):
    """Task vectors of zeros: no norm, no angle, no largest change."""
    assert equal(merged(name, [BASE, dict(BASE)], BASE), BASE)


@several
def test_one_that_is_the_base(name: str):
    """No angle to a task vector of zeros: still numbers, and nothing beyond twice the other's change."""
    found = merged(name, [A, dict(BASE)], BASE)
    assert all_finite(found)
    if name not in {"dare_linear", "dare_ties", "della", "della_linear"}:  # those scale what they keep
        for key in A:
            assert (found[key] - BASE[key]).norm() <= 2 * (A[key] - BASE[key]).norm() + 1e-5


@every
def test_zeros(name: str):
    nothing = like(A, 0.0)
    assert equal(merged(name, [nothing, dict(nothing)], nothing), nothing, 0)


@several
def test_opposed_models(name: str):
    """Changes that cancel leave no direction."""
    up, down = ({key: BASE[key] + step for key in BASE} for step in (0.1, -0.1))
    assert all_finite(merged(name, [up, down], BASE))


# Dtypes and shapes


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_models_stays(name: str, dtype: torch.dtype):
    models = [{key: value.to(dtype) for key, value in one.items()} for one in (A, B, BASE)]
    found = merged(name, models[:2], models[2])
    assert {found[key].dtype for key in found} == {dtype}
    assert all_finite(found)


@several
def test_dtypes_that_differ_are_widened(name: str):
    half, brain = ({k: v.to(d) for k, v in m.items()} for m, d in ((A, torch.float16), (B, torch.bfloat16)))
    found = merged(name, [half, brain], {key: value.bfloat16() for key, value in BASE.items()})
    assert {found[key].dtype for key in found} == {torch.float32}


@every
def test_empty_tensors_and_scalars(name: str):
    def more(model: Checkpoint, value: float) -> Checkpoint:
        return model | {"none": torch.zeros(0, 4), "sole": torch.tensor(value), "step": torch.tensor(int(value))}

    found = merged(name, [more(A, 1.0), more(B, 3.0)], more(BASE, 2.0))
    assert found["none"].shape == (0, 4)
    assert found["sole"].shape == ()
    assert found["sole"].isfinite()
    # What holds no floats comes from the base where one was given, else from the first model.
    assert found["step"].item() == (1 if name in BASELESS | SOLE else 2)


ADDS_UP = {"task_arithmetic", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"}
ADDS_UP |= {"gradient_matching"}
"""Add the changes of all models, or scale those that they keep."""


@every
def test_what_does_not_fit_into_float16(name: str, tmp_path: Path):
    big, base = like(A, 60000.0, torch.float16), like(BASE, 1.0, torch.float16)
    found = merged(name, [big, dict(big)], base)
    if name not in ADDS_UP:
        assert all_finite(found)
        return
    with pytest.raises(
        Error, match=r"tensor (layers\.[01]\.w|norm): the value .* does not fit in float16 \(largest 65504\)"
    ):
        found.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert found.cast("float32")["layers.0.w"].dtype == torch.float32


FITS = {"mean", "slerp", "karcher", "fisher", "regmean", "nearswap", "arcee_fusion", "passthrough"}
"""Never form the difference of a model and the base, or do not take it."""


@every
def test_what_does_not_fit_into_float32(name: str):
    found = merged(name, [like(A, 3e38), like(A, 3e38)], like(BASE, -3e38))
    if name in FITS:
        assert all_finite(found)
        return
    with pytest.raises(Error, match=r"tensor layers\.0\.w: the merge gives (inf|nan) .* where all inputs are finite"):
        found["layers.0.w"]
