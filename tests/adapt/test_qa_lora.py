"""Changes of low rank that merge into the minima of quantized weights."""

import copy

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith import Error
from weightsmith.adapt import fold, qa_lora
from weightsmith.quantize import rtn
from weightsmith.quantize.grids import Integer
from weightsmith.quantize.training import coded, codes

X = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
GRID = Integer(3, 4, symmetric=False, zero="float")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def learned(model, **options):
    found = qa_lora(model, rank=2, bits=3, group=2, **options)
    for made in found.values():
        torch.nn.init.normal_(made.b)
    return found


def test_it_begins_as_the_quantized_module_and_only_factors_learn():
    model = network()
    plain = [model[i].weight.detach().clone() for i in (0, 2)]
    found = qa_lora(model, rank=2, bits=3, group=2)
    assert list(found) == ["0.weight", "2.weight"]
    for index, weight in zip((0, 2), plain, strict=True):
        by_hand = rtn(weight, grid=Integer(3, 2, symmetric=False, zero="float")).values()
        assert torch.equal(model[index].weight, by_hand)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b"}
    assert model[0].parametrizations.weight.original.shape == (6, 4)
    assert found["0.weight"].a.shape == (2, 4)


def test_the_change_is_an_adapter_on_inputs_pooled_over_groups():
    model = nn.Linear(8, 5, bias=False)
    made = qa_lora(model, "*", rank=2, alpha=3.0, bits=3, group=4)["weight"]
    base = model.weight.detach().clone()
    torch.nn.init.normal_(made.b)
    pooled = nn.functional.avg_pool1d(X.unsqueeze(1), 4).squeeze(1)
    wanted = X @ base.T + 3.0 / 2 * pooled @ made.a.T @ made.b.T
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_rounds_nothing_again(dtype):
    model = network().to(dtype)
    found = learned(model)
    x = X.to(dtype)
    before, begun = model(x), {name: made.codes.clone() for name, made in found.items()}
    stored = coded(model)
    merged = ws.quantize.dequantize(stored)
    other = copy.deepcopy(model)
    fold(other)
    assert torch.equal(other(x), before)
    for name, one in codes(model).items():
        assert torch.equal(one.codes, begun[name])
        assert torch.equal(merged[name].to(dtype), dict(other.named_parameters())[name])
    plain = network().to(dtype)
    merged.cast(dtype).load_into(plain)
    assert torch.equal(plain(x), before)
    assert stored["0.weight_minimum"].shape == (6, 4)
    assert stored["0.weight_minimum"].dtype == dtype


def test_training_lowers_the_loss_and_leaves_codes_and_minima_alone():
    model = network()
    found = qa_lora(model, rank=2, bits=2, group=2)
    minima = model[0].parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model[0].parametrizations.weight.original, minima)
    assert found["0.weight"].b.abs().sum() > 0


def test_a_better_rounding_can_be_the_base():
    model = network()
    weight = model[0].weight.detach().clone()
    base = rtn(weight, torch.rand(8) + 0.1, grid=GRID, clip=10)
    found = qa_lora(model, rank=1, bits=3, group=2, base={"0.weight": base})
    assert torch.equal(model[0].weight, base.values())
    assert (found["0.weight"].size, found["2.weight"].size) == (4, 2)


def test_states_copies_convolutions_and_whole_rows():
    torch.manual_seed(0)

    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2))

    model, other, x = fresh(), fresh(), torch.randn(2, 2, 3, 3)
    for seed, one in enumerate((model, other)):
        found = qa_lora(one, rank=1, group=None, seed=seed)
        torch.nn.init.normal_(found["0.weight"].b)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_assigning_a_weight_finds_the_nearest_minima():
    model = nn.Linear(8, 5, bias=False)
    made = qa_lora(model, "*", rank=1, bits=3, group=4)["weight"]
    torch.nn.init.normal_(made.b)
    wanted = model.weight.detach() + torch.tensor([1.0, -2.0]).repeat_interleave(4)
    model.weight = wanted
    torch.testing.assert_close(model.weight, wanted)


def test_what_cannot_be_is_refused_before_anything_changes():
    model = network()
    with pytest.raises(Error, match="rank must be at least 1"):
        qa_lora(model, rank=0)
    with pytest.raises(Error, match="do not fill a row"):
        qa_lora(model, group=5)
    with pytest.raises(Error, match=r"base has x, which is no weight"):
        qa_lora(model, group=2, base={"x": rtn(torch.ones(2, 4), grid=GRID)})
    with pytest.raises(Error, match=r"the base of 0\.weight has scale"):
        qa_lora(model, group=2, base={"0.weight": rtn(model[0].weight.detach())})
    with pytest.raises(Error, match=r"base has \[2, 8\] codes"):
        qa_lora(model, group=2, base={"0.weight": rtn(torch.ones(2, 8), grid=GRID)})
    assert all(p.requires_grad for p in model.parameters())
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_each_weight_draws_its_own_and_a_seed_says_what():
    model, again, other = (nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6)) for _ in range(3))
    found, same, differs = (
        qa_lora(one, "*weight", rank=2, group=4, seed=seed) for one, seed in ((model, 0), (again, 0), (other, 2**32))
    )
    assert torch.equal(found["0.weight"].a, same["0.weight"].a)
    assert not torch.equal(found["0.weight"].a, found["1.weight"].a)
    assert not torch.equal(found["0.weight"].a, differs["0.weight"].a)
    assert found["0.weight"].a.abs().max() <= (6 / (2 + 2)) ** 0.5


def test_a_base_goes_where_the_weight_is():
    model = nn.Linear(8, 5).to("meta")
    base = rtn(torch.randn(5, 8), grid=GRID)
    made = qa_lora(model, "weight", rank=1, group=4, base={"weight": base})["weight"]
    assert {value.device.type for value in (made.codes, made.scale, made.a, made.b)} == {"meta"}
    assert model.weight.device.type == "meta"
