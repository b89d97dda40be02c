"""What fine-tuning changed, as an adapter."""

from __future__ import annotations

import json

import pytest
import torch

import weightsmith as ws
from weightsmith.weights import Weights

from .conftest import random


def models():
    base = {
        "embed.weight": random(9, 4),
        "h.0.fc.weight": random(6, 4, seed=1),
        "h.0.fc.bias": random(6, seed=2),
        "h.0.norm.weight": torch.ones(4),
        "h.0.conv.weight": random(5, 3, 2, 2, seed=3),
        "h.0.same.weight": random(5, 4, seed=4),
        "steps": torch.tensor(3),
    }
    tuned = {
        name: value if "same" in name or name == "steps" else value + 0.1 * random(*value.shape, seed=50)
        for name, value in base.items()
    }
    return tuned, base


def test_at_full_rank_the_round_trip_is_the_model():
    tuned, base = models()
    for options in ({"rank": 10**6}, {"energy": 1.0}, {"rank": 99, "embeddings": True}):
        found = ws.adapt.apply(base, ws.adapt.extract(tuned, base, **options))
        for name, value in tuned.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_nearest_of_a_rank(rank):
    tuned, base = models()
    adapter = ws.adapt.extract(tuned, base, rank, rest="skip")
    found = ws.adapt.apply(base, adapter)
    for name in ("h.0.fc.weight", "h.0.conv.weight"):
        change = (tuned[name] - base[name]).flatten(1)
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close((found[name] - base[name]).flatten(1), best, rtol=1e-4, atol=1e-5)
        told = adapter.lineage.options["tensors"][name]
        assert told["rank"] == rank
        assert told["kept"] == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-5)
    assert torch.equal(found["h.0.norm.weight"], base["h.0.norm.weight"])
    skipped = {"embed.weight", "h.0.fc.bias", "h.0.norm.weight"}
    assert set(adapter.lineage.options["skipped"]) == skipped


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
def test_the_least_rank_that_keeps_enough(energy):
    tuned, base = models()
    adapter = ws.adapt.extract(tuned, base, energy=energy)
    capped = ws.adapt.extract(tuned, base, rank=1, energy=energy)
    for name, told in adapter.lineage.options["tensors"].items():
        squares = torch.linalg.svdvals((tuned[name] - base[name]).flatten(1)).square()
        shares = squares.cumsum(0) / squares.sum()
        assert told["rank"] == int((shares < energy).sum()) + 1
        assert capped.lineage.options["tensors"][name]["rank"] == 1


def test_by_tensor_and_by_pattern():
    tuned, base = models()
    adapter = ws.adapt.extract(tuned, base, {"*fc*": 2, "*": 1}, pattern="*.fc.*")
    assert {name for name in adapter if "lora_A" in name} == {"base_model.model.h.0.fc.lora_A.weight"}
    assert torch.equal(adapter["base_model.model.h.0.conv.weight"], tuned["h.0.conv.weight"])
    config = json.loads(adapter.files["adapter_config.json"])
    assert config["bias"] == "lora_only"
    assert config["target_modules"] == ["fc"]
    assert config["modules_to_save"] == ["embed", "h.0.conv", "h.0.norm"]


def test_large_matrices_are_nearly_as_good_and_follow_the_seed():
    """A spectrum that falls off slowly, through the random start."""
    u, v = torch.linalg.qr(random(700, 600, seed=1)).Q, torch.linalg.qr(random(600, 600, seed=2)).Q
    spectrum = torch.arange(1, 601).float() ** -0.7
    base, tuned = {"fc.weight": torch.zeros(700, 600)}, {"fc.weight": (u * spectrum) @ v.T}
    ideal = float(spectrum[:16].square().sum() / spectrum.square().sum())
    made = [ws.adapt.extract(tuned, base, 16, seed=seed) for seed in (0, 0, 1)]
    kept = [one.lineage.options["kept"] for one in made]
    assert ideal * 0.999 < kept[0] <= ideal * (1 + 1e-5)
    left = (ws.adapt.apply(base, made[0])["fc.weight"] - tuned["fc.weight"]).square().sum() / spectrum.square().sum()
    assert float(left) == pytest.approx(1 - kept[0], rel=1e-3)
    factors = [one["base_model.model.fc.lora_A.weight"] for one in made]
    assert torch.equal(factors[0], factors[1])
    assert not torch.equal(factors[0], factors[2])
    wide = ws.adapt.extract({"fc.weight": tuned["fc.weight"].T.contiguous()}, {"fc.weight": torch.zeros(600, 700)}, 16)
    assert wide.lineage.options["kept"] == pytest.approx(kept[0], rel=1e-3)
    by_energy = ws.adapt.extract(tuned, base, energy=0.5).lineage.options["tensors"]["fc.weight"]
    least = int(((spectrum.square().cumsum(0) / spectrum.square().sum()) < 0.5).sum()) + 1
    assert least <= by_energy["rank"] <= least + 1


def test_low_precision_and_other_dtypes():
    tuned, base = models()
    low = [{name: value.bfloat16() if value.is_floating_point() else value for name, value in one.items()}
           for one in (tuned, base)]  # fmt: skip
    adapter = ws.adapt.extract(*low, rank=99)
    assert adapter.spec("base_model.model.h.0.fc.lora_A.weight").dtype == torch.float32
    found = ws.adapt.apply(low[1], adapter)
    assert torch.equal(found["h.0.fc.weight"], low[0]["h.0.fc.weight"])
    assert (
        ws.adapt.extract(*low, rank=1, dtype="bf16").spec("base_model.model.h.0.fc.lora_A.weight").dtype
        == torch.bfloat16
    )


def test_a_prefix_is_put_before_all_names():
    tuned, base = models()
    adapter = ws.adapt.extract(tuned, base, 99, prefix="transformer.")
    assert all(name.startswith("base_model.model.transformer.") for name in adapter)
    found = ws.adapt.apply({f"transformer.{name}": value for name, value in base.items()}, adapter)
    torch.testing.assert_close(found["transformer.h.0.fc.weight"], tuned["h.0.fc.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs rank= or energy="),
        ({"rank": 0}, "rank is a count"),
        ({"rank": 1.5}, "rank is a count"),
        ({"energy": 0.0}, "energy is a share"),
        ({"energy": 1.1}, "energy is a share"),
        ({"rank": 1, "rest": "refuse"}, "3 tensors changed that become no product"),
        ({"rank": 1, "rest": "drop"}, "rest is"),
    ],
    ids=str,
)
def test_refusals(options, message):
    with pytest.raises(ws.Error, match=message):
        ws.adapt.extract(*models(), **options)


def test_more_refusals():
    tuned, base = models()
    with pytest.raises(ws.Error, match="nothing to extract"):
        ws.adapt.extract(base, base, 1)
    with pytest.raises(ws.Error, match="differ in shape: steps"):
        ws.adapt.extract(tuned | {"steps": torch.ones(2)}, base, 1)
    with pytest.raises(ws.Error, match="the same tensors"):
        ws.adapt.extract(tuned, base | {"more": torch.ones(1)}, 1)
    broken = tuned | {"h.0.fc.weight": torch.full((6, 4), torch.nan)}
    with pytest.raises(ws.Error, match=r"h\.0\.fc\.weight is not finite"):
        ws.adapt.extract(broken, base, 1)
    with pytest.raises(ws.Error, match="outside of any module"):
        ws.adapt.extract(tuned | {"steps": torch.tensor(4)}, base, 1)


def test_saved_to_a_folder_and_read_back(tmp_path):
    tuned, base = models()
    adapter = ws.adapt.extract(Weights.of(tuned), base, 2)
    adapter.save(tmp_path / "adapter")
    found = ws.adapt.apply(base, tmp_path / "adapter")
    expected = ws.adapt.apply(base, adapter)
    assert all(torch.equal(found[name], expected[name]) for name in base)
