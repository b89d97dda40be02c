"""What each rounded weight costs, and keeping the few that cost most."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import damage, dequantize, requant, with_kept
from weightsmith.quantize._sensitive import shared_out


def small(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    data = [(torch.randn(20, 10), torch.randint(0, 5, (20,))) for _ in range(2)]
    return model, data


def mean_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        total = sum(float(functional.cross_entropy(model(x), y, reduction="sum")) for x, y in data)
    return total / sum(len(x) for x, _ in data)


def total_of(scores: Any) -> float:
    return float(sum(score.sum(dtype=torch.float64) for score in scores.values()))


def test_scores_add_up_to_what_was_done_to_the_loss():
    model, data = small()
    coded = ws.quantize.rtn(model, bits=2)
    values = dequantize(coded)
    rounded = copy.deepcopy(model)
    values.load_into(rounded)
    true = mean_loss(rounded, data) - mean_loss(model, data)
    for given in (coded, values, rounded):
        assert total_of(damage(model, given, data, points=32)) == pytest.approx(true, abs=2e-4)
    errors = [abs(total_of(damage(model, coded, data, points=points)) - true) for points in (1, 2, 8)]
    assert errors[2] < 0.2 * errors[1] < 0.2 * errors[0]  # midpoints: the error falls with the square


def test_the_formula():
    model, data = small()
    values = dequantize(ws.quantize.rtn(model, bits=2))
    found = damage(model, values, data, points=3, pattern="2.weight")
    assert list(found) == ["2.weight"]
    weight = model.state_dict()["2.weight"].clone()
    total = torch.zeros_like(weight)
    for point in (1 / 6, 3 / 6, 5 / 6):
        moved = copy.deepcopy(model)
        moved[2].weight.data = weight + point * (values["2.weight"] - weight)
        loss = sum(functional.cross_entropy(moved(x), y, reduction="sum") for x, y in data)
        total += torch.autograd.grad(loss, moved[2].weight)[0]
    torch.testing.assert_close(found["2.weight"], total * (values["2.weight"] - weight) / 3 / 40, rtol=1e-4, atol=1e-7)


def test_of_a_quadratic_one_point_is_exact():
    layer = nn.Linear(3, 2, bias=False)
    data = [torch.randn(5, 3, generator=torch.Generator().manual_seed(0))]
    moved = {"weight": layer.weight.detach().round()}

    def loss(model: Any, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    before, after = (float((data[0] @ one.T).square().sum()) / 5 for one in (layer.weight.detach(), moved["weight"]))
    assert total_of(damage(layer, moved, data, points=1, loss=loss)) == pytest.approx(after - before, rel=1e-4)


def test_what_is_tied_or_not_reached_is_of_no_harm():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.idle = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).tanh())

    model = Tied()
    moved = {name: value.round(decimals=1) for name, value in model.state_dict().items()}
    data = [(torch.eye(4), torch.tensor([0, 1, 2, 3]))]
    found = damage(model, moved, data, points=16)
    assert torch.equal(found["idle.weight"], torch.zeros(4, 4))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.one.weight.copy_(moved["one.weight"])
    assert total_of(found) == pytest.approx(mean_loss(other, data) - mean_loss(model, data), abs=1e-5)


def test_the_model_is_left_as_it_was():
    model, data = small()
    model.train()
    before = copy.deepcopy(model.state_dict())
    coded = ws.quantize.rtn(model, bits=2)
    damage(model, coded, data)
    requant(model, data, bits=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.training


@pytest.mark.parametrize("share", [0.03, 0.9])
def test_as_many_are_kept_as_the_shares_say_and_in_full(share: float):
    model, data = small()
    numel = 10 * 16 + 16 * 12 + 12 * 5
    found = requant(model, data, bits=2, outliers=0.05, kept=share, rounds=3)
    kept = {name: found[f"{name}_kept_places"] for name in ("0.weight", "2.weight", "4.weight")}
    assert sum(len(places) for places in kept.values()) == round(0.05 * numel) + round(share * numel)
    whole = with_kept(found)
    assert set(whole) == set(model.state_dict())
    dense = dequantize(found.drop("*_kept*"))
    for name, places in kept.items():
        assert len(places.unique()) == len(places)
        weight, made = model.state_dict()[name].flatten(), whole[name].flatten()
        assert torch.equal(made[places], weight[places])
        others = torch.ones(len(made), dtype=torch.bool).index_fill(0, places, False)
        assert torch.equal(made[others], dense[name].flatten()[others])


def test_outliers_do_not_stretch_the_range_of_others():
    model, data = small()
    with torch.no_grad():
        model[2].weight[3, 4] = 50.0
    plain = ws.quantize.rtn(model, bits=3)
    found = requant(model, data, bits=3, outliers=0.01, kept=0.0)
    assert 3 * 16 + 4 in found["2.weight_kept_places"].tolist()
    assert found["2.weight_scale"][3] < 0.1 * plain["2.weight_scale"][3]
    assert with_kept(found)["2.weight"][3, 4] == 50


def test_of_the_most_damaging_weights_those_are_kept():
    model, data = small()
    coded = ws.quantize.rtn(model, bits=2)
    scores = damage(model, coded, data)
    found = requant(model, data, bits=2, outliers=0.0, kept=0.02, rounds=1)
    every = torch.cat([scores[name].flatten() for name in ("0.weight", "2.weight", "4.weight")])
    expected, start = set(every.abs().topk(round(0.02 * len(every))).indices.tolist()), 0
    mine = set()
    for name in ("0.weight", "2.weight", "4.weight"):
        mine |= {start + place for place in found[f"{name}_kept_places"].tolist()}
        start += scores[name].numel()
    assert mine == expected


def test_they_lose_less_than_as_many_of_the_largest():
    model, data = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        sum(functional.cross_entropy(model(x), y) for x, y in data).backward()  # type: ignore[union-attr]
        optimizer.step()
    made = copy.deepcopy(model)
    losses = {}
    for name, outliers, kept in (("none", 0.0, 0.0), ("largest", 0.1, 0.0), ("damage", 0.0, 0.1)):
        with_kept(requant(model, data, bits=2, outliers=outliers, kept=kept)).load_into(made)
        losses[name] = mean_loss(made, data)
    assert losses["damage"] < 0.8 * min(losses["none"], losses["largest"])


def test_a_rounding_that_needs_statistics():
    model, data = small()
    gram = ws.stats.gram(model, [x for x, _ in data])
    found = requant(model, data, "gptq", stats=gram, bits=2, outliers=0.0, kept=0.0)
    assert torch.equal(found["2.weight_packed"], ws.quantize.gptq(model, stats=gram, bits=2)["2.weight_packed"])
    assert len(found["2.weight_kept"]) == 0


def test_through_a_file(tmp_path: Any):
    model, data = small()
    found = requant(model, data, bits=3, outliers=0.02, kept=0.02)
    found.save(tmp_path / "out.safetensors")
    again = with_kept(ws.open(tmp_path / "out.safetensors"))
    for name, value in with_kept(found).items():
        assert torch.equal(again[name], value)
    scores = damage(model, tmp_path / "out.safetensors", data)
    places = found["2.weight_kept_places"]
    assert not scores["2.weight"].flatten()[places].any()


def test_what_is_kept_must_fit():
    coded = ws.quantize.rtn({"l.weight": torch.eye(2)})
    with pytest.raises(Error, match=r"l\.weight: weights are kept, but"):
        with_kept(coded | {"l.weight_kept": torch.ones(1)})
    for places in ([4], [-1], [0, 1]):
        bad = coded | {"l.weight_kept": torch.ones(1), "l.weight_kept_places": torch.tensor(places)}
        with pytest.raises(Error, match="places outside of it"):
            with_kept(bad)["l.weight"]


@pytest.mark.parametrize("count", [0, 1, 7, 20, 99])
def test_shares(count: int):
    harm = {"a": 5.0, "b": 0.0, "c": 1.3, "d": 0.2}
    sizes = {"a": 4, "b": 9, "c": 5, "d": 2}
    found = shared_out(harm, sizes, count)
    assert sum(found.values()) == min(count, 20)
    assert all(found[name] <= sizes[name] for name in sizes)
    assert shared_out(dict.fromkeys(harm, 0.0), sizes, 4) == dict.fromkeys(harm, 1)


def test_refusals():
    model, data = small()
    coded = ws.quantize.rtn(model, bits=2)
    with pytest.raises(Error, match="points is a whole number from 1, got 0"):
        damage(model, coded, data, points=0)
    with pytest.raises(Error, match="no tensor of the quantized weights differs"):
        damage(model, copy.deepcopy(model), data)
    with pytest.raises(Error, match="damage needs at least one batch"):
        damage(model, coded, [])
    with pytest.raises(Error, match=r"2\.weight of the quantized weights are of other shapes"):
        damage(model, {"2.weight": torch.ones(2, 2)}, data)
    with pytest.raises(Error, match="the loss is no finite number"):
        damage(model, coded, data, loss=lambda called, batch: called(batch[0]).sum() * torch.nan)
    with pytest.raises(Error, match="shares whose sum is below 1"):
        requant(model, data, outliers=0.6, kept=0.6)
    with pytest.raises(Error, match="rounds is a whole number"):
        requant(model, data, rounds=0)
    with pytest.raises(Error, match="sequential is no rounding of one layer at a time"):
        requant(model, data, "sequential")
