"""Methods that pick weights, against loops over elements written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._pick import arcee_fusion, nearswap, passthrough, ram, ramplus_tl, sce

METHODS = [nearswap, sce, ram, arcee_fusion]


def fine_tunes(k: int, *shape: int, change: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base + change * torch.randn(k, *shape, generator=generator), base


def flat(*tensors: Tensor) -> list[list[float]]:
    return [tensor.double().flatten().tolist() for tensor in tensors]


def check(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.flatten().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


# nearswap


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("t", [0.0, 0.01, 0.1, 10.0])
def test_nearswap_moves_by_at_most_t(t: float, k: int):
    models, base = fine_tunes(k, 6, 7)
    expected = flat(base)[0]
    for model in flat(*models):
        for j, (w0, w1) in enumerate(zip(expected, model, strict=True)):
            share = min(1.0, t / abs(w1 - w0))
            expected[j] = share * w1 + (1 - share) * w0
    check(nearswap(models, base, t=t), expected)


def test_nearswap_swaps_near_weights_exactly():
    models, base = fine_tunes(1, 1000)
    near = (models[0] - base).abs() < 0.0499
    found = nearswap(models, base, t=0.05)
    assert 100 < near.sum() < 900
    assert torch.equal(found[near], models[0][near])


# sce


def sce_by_hand(models: Tensor, base: Tensor, share: float) -> list[float]:
    origin, *several = flat(base, *models)
    k, n = len(several), len(origin)
    d = [[several[i][j] - origin[j] for j in range(n)] for i in range(k)]
    if share < 1:
        means = [sum(d[i][j] for i in range(k)) / k for j in range(n)]
        variance = [sum((d[i][j] - means[j]) ** 2 for i in range(k)) / k for j in range(n)]
        count = int(sum(v > 0 for v in variance) * share)
        chosen = sorted(range(n), key=lambda j: (-variance[j], j))[:count]
        d = [[d[i][j] if j in chosen else 0.0 for j in range(n)] for i in range(k)]
    a = [sum(x * x for x in d[i]) for i in range(k)]
    result = []
    for j in range(n):
        total = sum(d[i][j] for i in range(k))
        agreeing = [i for i in range(k) if d[i][j] * total > 0]
        weight = sum(a[i] for i in agreeing)
        result.append(origin[j] + (sum(a[i] * d[i][j] for i in agreeing) / weight if weight else 0.0))
    return result


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("shape", [(40,), (6, 7)])
def test_sce(shape: tuple[int, ...], k: int, share: float):
    models, base = fine_tunes(k, *shape)
    models = base + (models - base) * torch.arange(1, k + 1).reshape(k, *[1] * len(shape))
    check(sce(models, base, select_topk=share), sce_by_hand(models, base, share))


def test_sce_weights_small_changes_like_large_ones():
    """Fine-tunes change weights by a thousandth; a floor under squares would make them all equal."""
    models, base = fine_tunes(3, 50)
    base = torch.zeros_like(base)
    models = (models - models.mean(0)) * torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(sce(models * 1e-4, base), sce(models, base) * 1e-4, rtol=1e-5, atol=1e-10)


def test_sce_selects_the_first_of_equal_variances():
    models = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert sce(models, torch.zeros(5), select_topk=0.5).tolist() == [1, 1, 0, 0, 0]


def test_sce_without_votes_is_the_base():
    _, base = fine_tunes(1, 4)
    assert torch.equal(sce(torch.stack([base, base]), base), base)
    opposed = torch.stack([base + 1, base - 1])
    torch.testing.assert_close(sce(opposed, base), base + 1)  # the sum is zero: plus wins, as in mergekit


# ram


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.2])
def test_ram(epsilon: float, k: int):
    models, base = fine_tunes(k, 6, 7)
    origin, *several = flat(base, *models)
    expected = []
    for j, w0 in enumerate(origin):
        changes = [model[j] - w0 for model in several if abs(model[j] - w0) > epsilon]
        expected.append(w0 + (sum(changes) / len(changes) if changes else 0.0))
    check(ram(models, base, epsilon=epsilon), expected)


# arcee_fusion


def importance(model: Tensor, base: Tensor) -> list[float]:
    scores = []
    for new, old in zip(model.double().tolist(), base.double().tolist(), strict=True):
        p, q = ([math.exp(x) / math.fsum(map(math.exp, row)) for x in row] for row in (new, old))
        divergence = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        scores += [abs(x - y) * divergence for x, y in zip(new, old, strict=True)]
    return scores


@pytest.mark.parametrize("shape", [(6, 7), (3, 50), (40, 2)])
def test_arcee_fusion(shape: tuple[int, int]):
    models, base = fine_tunes(1, *shape, change=0.5)
    scores = importance(models[0], base)
    ordered, last = sorted(scores), len(scores) - 1
    first, middle, third = ordered[int(last * 0.25)], ordered[int(last * 0.5)], ordered[int(last * 0.75)]
    picked = [score >= middle + 1.5 * (third - first) for score in scores]
    assert 0 < sum(picked) < len(picked) / 2
    expected = torch.where(torch.tensor(picked).reshape(shape), models[0], base)
    assert torch.equal(arcee_fusion(models, base), expected)


def test_arcee_fusion_takes_models_in_turn():
    models, base = fine_tunes(2, 6, 7)
    assert torch.equal(arcee_fusion(models, base), arcee_fusion(models[1:], arcee_fusion(models[:1], base)))


def test_arcee_fusion_sees_small_changes():
    """Divergences of 1e-9 and less, which a sum in float32 cannot tell from its own rounding."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(64, 512, generator=generator)
    models = (base + 1e-5 * torch.randn(64, 512, generator=generator)).unsqueeze(0)
    taken = arcee_fusion(models, base) == models[0]
    assert 0.01 < taken.float().mean() < 0.2
    assert torch.equal(taken, arcee_fusion(models.double(), base.double()) == models[0])


# all


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_leaves_the_range_of_base_and_models(method: Callable[..., Tensor]):
    models, base = fine_tunes(3, 30, 20)
    everything = torch.cat([models, base.unsqueeze(0)])
    found = method(models, base)
    assert (found >= everything.amin(0) - 1e-6).all()
    assert (found <= everything.amax(0) + 1e-6).all()
    assert not torch.equal(found, base)


@pytest.mark.parametrize("method", METHODS)
def test_models_that_are_the_base_give_the_base(method: Callable[..., Tensor]):
    _, base = fine_tunes(1, 4, 5)
    assert torch.equal(method(torch.stack([base, base]), base), base)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_has_the_dtype_of_the_models(method: Callable[..., Tensor]):
    models, base = fine_tunes(2, 4, 5)
    assert method(models.bfloat16(), base).dtype == torch.bfloat16
    assert method(models, base.bfloat16()).dtype == torch.float32
    assert method(models.double(), base).dtype == torch.float64


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (nearswap, {"t": -1.0}, "nearswap: t must be a finite number of at least 0, got -1"),
        (nearswap, {"t": float("nan")}, "nearswap: t must be"),
        (sce, {"select_topk": 1.5}, "sce: select_topk is a share between 0 and 1, got 1.5"),
        (ram, {"epsilon": -1e-5}, "ram: epsilon must be at least 0"),
    ],
)
def test_options_are_refused_before_any_tensor_is_read(method: Any, options: dict[str, Any], message: str):
    models, base = fine_tunes(2, 4)
    with pytest.raises(Error, match=message):
        method(models, base, **options)
    with pytest.raises(Error, match=message):
        getattr(ws.merge, method.__name__)([{"w": model} for model in models], {"w": base}, **options)


@pytest.mark.parametrize("method", METHODS)
def test_no_model_is_refused(method: Callable[..., Tensor]):
    with pytest.raises(Error, match=f"{method.__name__} needs at least 1 model, got 0"):
        method(torch.ones(0, 2), torch.ones(2))


@pytest.mark.parametrize("method", METHODS)
def test_a_base_is_needed(method: Callable[..., Tensor]):
    with pytest.raises(Error, match=f"{method.__name__} needs base="):
        getattr(ws.merge, method.__name__)([{"w": torch.ones(2)}])


def test_passthrough():
    model = torch.tensor([[1.0, -2.5, 0.0]])
    assert torch.equal(passthrough(model), model[0])
    assert torch.equal(passthrough(model, scale=None), model[0])
    assert passthrough(model, scale=-2.0).tolist() == [-2, 5, 0]
    for count in (0, 2):
        with pytest.raises(Error, match=f"passthrough needs exactly 1 model, got {count}"):
            passthrough(torch.ones(count, 3))
    with pytest.raises(Error, match="passthrough needs exactly 1 model, got 2"):
        ws.merge.passthrough([{"w": torch.ones(1)}] * 2)
    with pytest.raises(Error, match="passthrough: scale must be a finite number, got inf"):
        passthrough(model, scale=math.inf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_passthrough_keeps_every_bit(dtype: torch.dtype):
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:2] = torch.tensor([-0.0, torch.finfo(dtype).tiny])
    found = ws.merge.passthrough([{"w": weight}])["w"]
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("options", [{}, {"r": 0.5, "alpha": 3.0}, {"r": 2.0, "alpha": 0.4, "epsilon": 0.3}], ids=str)
def test_ramplus_tl_by_a_loop(options: dict[str, Any]):
    r, alpha, epsilon = options.get("r", 0.1), options.get("alpha", 0.2), options.get("epsilon", 1e-5)
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(200, generator=generator)
    deltas = torch.randn(3, 200, generator=generator) * (torch.rand(3, 200, generator=generator) > 0.7)
    models = base + deltas
    changes = (models.double() - base.double()).tolist()
    who = [[i for i in range(3) if abs(changes[i][j]) > epsilon] for j in range(200)]
    shared = [sum(i in one and len(one) > 1 for one in who) for i in range(3)]
    alone = [sum(one == [i] for one in who) for i in range(3)]
    factor = [1 + r * min(shared[i] / alone[i], alpha) for i in range(3)]
    expected = []
    for j, one in enumerate(who):
        changed = [changes[i][j] for i in one]
        move = factor[one[0]] * changed[0] if len(one) == 1 else sum(changed) / max(len(changed), 1)
        expected.append(float(base[j]) + move)
    assert min(alone) > 0
    torch.testing.assert_close(ramplus_tl(models, base, **options), torch.tensor(expected))
    assert torch.equal(ws.merge.ramplus_tl([{"w": m} for m in models], {"w": base}, **options)["w"],
                       ramplus_tl(models, base, **options))  # fmt: skip


@pytest.mark.parametrize("name", ["r", "alpha", "epsilon"])
def test_ramplus_tl_refuses(name: str):
    given: dict[str, Any] = {name: -1.0}
    with pytest.raises(Error, match=f"ramplus_tl: {name} must be a finite number of at least 0, got -1"):
        ramplus_tl(torch.ones(1, 2), torch.ones(2), **given)
