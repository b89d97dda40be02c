"""Several adapters into one, by hand."""

from __future__ import annotations

import json

import pytest
import torch

import weightsmith as ws
from weightsmith.adapt._combine import trimmed_sum
from weightsmith.weights import Weights

from .conftest import adapter, factors, random

ONE = adapter(factors("fc", 5, 4) | factors("out", 3, 5, seed=5), lora_alpha=3)
TWO = adapter(factors("fc", 5, 4, rank=3, seed=2), r=3, lora_alpha=5, use_rslora=True)


def change(found: Weights, name: str = "fc.weight") -> torch.Tensor:
    model = {"fc.weight": torch.zeros(5, 4), "out.weight": torch.zeros(3, 5)}
    return ws.adapt.apply(model, found)[name]


def test_side_by_side_is_the_sum():
    both = ws.adapt.combine([ONE, TWO], [0.5, -2.0])
    torch.testing.assert_close(change(both), 0.5 * change(ONE) - 2 * change(TWO))
    torch.testing.assert_close(change(both, "out.weight"), 0.5 * change(ONE, "out.weight"))
    config = json.loads(both.files["adapter_config.json"])
    ranks = {"fc": 5, "out": 2}
    assert {name: both.spec(f"base_model.model.{name}.lora_A.weight").shape[0] for name in ranks} == ranks
    assert config["r"] == config["lora_alpha"]
    assert set(config["target_modules"]) == set(ranks)


def test_the_best_sum_of_a_rank():
    whole = change(ONE) + change(TWO)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    for rank in (1, 2, 3):
        found = change(ws.adapt.combine([ONE, TWO], combination="svd", rank=rank))
        torch.testing.assert_close(found, u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-4, atol=1e-4)
    full = ws.adapt.combine([ONE, TWO], combination="svd", rank=99)
    torch.testing.assert_close(change(full), whole, rtol=1e-4, atol=1e-4)
    assert full.spec("base_model.model.fc.lora_A.weight").shape == (4, 4)


def test_one_adapter_is_itself():
    for combination in ("cat", "linear", "svd"):
        torch.testing.assert_close(change(ws.adapt.combine([TWO], combination=combination)), change(TWO))


def test_biases_of_products_are_summed():
    one = adapter(factors("fc", 5, 4) | {"fc.lora_B.bias": torch.ones(5)}, lora_bias=True)
    both = ws.adapt.combine([one, ONE], [2.0, 1.0])
    found = ws.adapt.apply(
        {"fc.weight": torch.zeros(5, 4), "fc.bias": torch.zeros(5), "out.weight": torch.zeros(3, 5)}, both
    )
    torch.testing.assert_close(found["fc.bias"], torch.full((5,), 2 * 1.5))


def test_trimming_by_a_slow_loop():
    members = [random(4, 5, seed=seed) for seed in range(3)]
    amounts, density = [0.5, -1.0, 2.0], 0.45
    found = trimmed_sum(members, amounts, "ties", density=density, majority="total", seed=0, name="x")
    kept = []
    for member in members:
        order = sorted(range(20), key=lambda i: -abs(float(member.flatten()[i])))[: int(density * 20)]
        kept.append([float(member.flatten()[i]) if i in order else 0.0 for i in range(20)])
    for i in range(20):
        sign = 1 if sum(one[i] for one in kept) >= 0 else -1
        agreeing = [amount * one[i] for amount, one in zip(amounts, kept, strict=True) if one[i] * sign > 0]
        expected = sum(agreeing) / max(len(agreeing), 1)
        assert float(found.flatten()[i]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_dropping_keeps_the_mean_and_follows_the_seed():
    ones = [torch.ones(200, 200)]
    found = [
        trimmed_sum(ones, [1.0], "dare_linear", density=0.3, majority="total", seed=s, name="x") for s in (0, 0, 1)
    ]
    assert found[0].unique().tolist() == pytest.approx([0, 1 / 0.3])
    assert float(found[0].mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_result_is_lazy_and_the_same_every_time(tmp_path):
    both = ws.adapt.combine([ONE, ONE], combination="dare_ties", density=0.5, seed=3)
    both.save(tmp_path / "a.safetensors")
    both.save(tmp_path / "b.safetensors", threads=3)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        ([], {}, "at least 1"),
        ([ONE, TWO], {"combination": "linear"}, "needs equal ranks, fc has 2, 3"),
        ([ONE, TWO], {"combination": "tie"}, "did you mean 'ties'"),
        ([ONE], {"combination": "ties"}, "needs density="),
        ([ONE], {"density": 0.5}, "takes no density"),
        ([ONE], {"combination": "ties", "density": 1.5}, "density is a share"),
        ([ONE], {"rank": 3}, "rank is a count for svd"),
        ([ONE], {"weight": [1.0, 2.0]}, "weight is 1 finite numbers"),
        ([ONE], {"combination": "ties", "density": 0.5, "majority": "most"}, "majority"),
        ([ONE, adapter(factors("fc", 4, 4))], {}, "another shape or kind"),
        ([adapter(factors("fc", 5, 4) | {"fc.lora_magnitude_vector": torch.ones(5)}, use_dora=True)], {}, "magnitudes"),
        ([adapter(factors("fc", 5, 4), target_parameters=["w"])], {}, "target_parameters"),
        (
            [adapter(factors("fc", 5, 4) | {"n.weight": torch.ones(2)}, modules_to_save=["n"])] * 2,
            {},
            "replaces n.weight",
        ),
        ([adapter(factors("fc", 5, 4), bias="all"), adapter(factors("fc", 5, 4), bias="lora_only")], {}, "bias is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(adapters, options, message):
    with pytest.raises(ws.Error, match=message):
        ws.adapt.combine(adapters, **options)
