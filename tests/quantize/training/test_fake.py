"""Straight-through quantization: the points of the grid forwards, the formulas backwards, and folding what learned."""

import copy
import math

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith import Error
from weightsmith.adapt import fold
from weightsmith.quantize import rtn
from weightsmith.quantize.grids import Integer, Levels
from weightsmith.quantize.training import (
    calm,
    coded,
    codes,
    elastic,
    fake,
    fake_inputs,
    learned_levels,
    self_compressing,
    statistical,
)
from weightsmith.quantize.training._fake import beneath, over_inputs, scaled_gradient, standing

X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
KINDS = {
    "fitted": lambda m: fake(m, bits=3),
    "fitted, groups": lambda m: fake(m, bits=2, group=3),
    "affine": lambda m: fake(m, bits=3, symmetric=False),
    "clipped": lambda m: fake(m, bits=2, clip=8),
    "levels": lambda m: fake(m, bits=2, grid="levels"),
    "learned": lambda m: fake(m, bits=3, step="learned"),
    "learned, affine": lambda m: fake(m, grid=Integer(3, 3, symmetric=False, zero="float"), step="learned"),
    "statistical": lambda m: statistical(m, bits=2),
    "elastic": lambda m: elastic(m, bits=(4, 2)),
    "learned_levels": lambda m: learned_levels(m, bits=2),
    "learned_levels, fixed": lambda m: learned_levels(m, bits=2, per_tensor=False, fixed=True),
    "self_compressing": lambda m: self_compressing(m, bits=4),
}


def network(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, stride=3), nn.ELU(), nn.Conv2d(6, 6, 2), nn.ELU(), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype)


def grids_on(kind: str, dtype=torch.float32) -> nn.Sequential:
    model = network(dtype)
    KINDS[kind](model)
    return model


def trained(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    target, losses = torch.arange(len(X)) % 3, []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X.to(next(model.parameters()).dtype)).float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_folding_and_files_all_give_what_the_module_computes_with(kind, dtype):
    model = grids_on(kind, dtype)
    trained(model)
    weights = {name: model.get_submodule(name.rpartition(".")[0]).weight.detach().clone() for name in codes(model)}
    assert list(weights) == ["0.weight", "2.weight", "5.weight"]
    assert all(weight.dtype == dtype for weight in weights.values())
    stored = ws.quantize.dequantize(coded(model))
    before = model(X.to(dtype))
    plain = copy.deepcopy(model)
    fold(plain)
    assert torch.equal(plain(X.to(dtype)), before)
    assert set(plain.state_dict()) == set(network().state_dict()) == set(stored)
    for name, weight in weights.items():
        # One ulp: a value in bfloat16 may be rounded once where its parameters are rounded too.
        torch.testing.assert_close(
            stored[name].to(dtype), weight, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
        )
        assert torch.equal(codes(model)[name].values().view(weight.shape).to(dtype), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_states_go_along(kind):
    model = grids_on(kind)
    trained(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), model(X))
    trained(other)
    assert not torch.equal(other(X), model(X))
    fresh = grids_on(kind)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "levels" not in kind or kind == "levels"])
def test_gradients_pass_to_the_weights_beneath(kind):
    model = grids_on(kind)
    losses = trained(model, 30)
    assert losses[-1] < losses[0]
    assert all(below.grad is not None and below.grad.abs().sum() > 0 for _, _, below in standing(model))


def test_looking_at_codes_changes_nothing():
    model = grids_on("learned")
    trained(model)
    state, grads = copy.deepcopy(model.state_dict()), {n: p.grad.clone() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    model.train()
    codes(model), coded(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert "parametrizations" in dict(model[0].named_children())


def test_fitted_grids_are_those_of_rounding_afterwards():
    model = network()
    fake(model, bits=3, group=3)
    plain = network()
    for name, one in codes(model).items():
        by_hand = rtn(plain.get_parameter(name).detach(), bits=3, group=3)
        assert torch.equal(one.codes, by_hand.codes)
        assert torch.equal(one.params["scale"], by_hand.params["scale"])


def test_the_gradient_is_that_at_the_quantized_weights():
    layer, reference = nn.Linear(5, 2), nn.Linear(5, 2)
    x = torch.randn(7, 5)
    fake(layer, bits=2, pattern="*")
    with torch.no_grad():
        reference.weight.copy_(layer.weight)
        reference.bias.copy_(layer.bias)
    layer(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, reference.weight.grad)


@pytest.mark.parametrize("affine", [False, True])
def test_learned_steps_get_the_gradients_of_the_formula(affine):
    torch.manual_seed(3)
    bits, group, inputs = 2, 4, 8
    grid = Integer(bits, group, symmetric=not affine, zero="float" if affine else "integer")
    layer = nn.Linear(inputs, 3, bias=False).double()
    made = fake(layer, grid=grid, step="learned", pattern="*")["weight"]
    learned = made.learned
    with torch.no_grad():
        for value in learned.values():
            value.mul_(0.6)  # so that some weights lie beyond the outermost points
    upstream = torch.randn(3, inputs, dtype=torch.float64)
    weight = layer.parametrizations.weight.original
    (layer.weight * upstream).sum().backward()
    lowest, highest = (0, 3) if affine else (-2, 1)
    slowed = 1 / math.sqrt(group * max(2 ** (bits - 1) - 1, 1))
    clipped = 0
    for row in range(3):
        for part in range(2):
            step = learned["scale"][row, part].item()
            start = learned["minimum"][row, part].item() if affine else 0.0
            of_step = of_start = 0.0
            for column in range(part * group, (part + 1) * group):
                place, g = (weight[row, column].item() - start) / step, upstream[row, column].item()
                within = lowest <= place <= highest
                level = round(min(max(place, lowest), highest))
                assert layer.weight[row, column].item() == pytest.approx(start + step * level, rel=1e-6)
                of_step += g * (level - place if within else level)
                of_start += 0.0 if within else g
                assert weight.grad[row, column].item() == pytest.approx(g if within else 0.0)
                clipped += not within
            assert learned["scale"].grad[row, part].item() == pytest.approx(of_step * slowed, rel=1e-4, abs=1e-6)
            if affine:
                assert learned["minimum"].grad[row, part].item() == pytest.approx(of_start * slowed, rel=1e-4, abs=1e-6)
    assert 2 < clipped < 22


def test_a_learned_step_goes_where_the_loss_is():
    layer = nn.Linear(16, 4, bias=False)
    made = fake(layer, bits=3, step="learned", pattern="*")["weight"]
    with torch.no_grad():
        made.learned["scale"].mul_(3)
    wanted = layer.parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    before = (layer.weight - wanted).square().sum().item()
    for _ in range(200):
        optimizer.zero_grad()
        (layer.weight - wanted).square().sum().backward()
        optimizer.step()
    assert (layer.weight - wanted).square().sum().item() < before / 3


def test_a_step_for_the_whole_tensor_learns_too():
    layer = nn.Linear(8, 4, bias=False)
    made = fake(layer, grid=Integer(3, per_tensor=True), step="learned", pattern="*")["weight"]
    assert made.learned["scale"].shape == ()
    (layer.weight.sum()).backward()
    assert made.learned["scale"].grad.abs() > 0
    assert torch.equal(ws.quantize.dequantize(coded(layer))["weight"], layer.weight)


def test_learned_steps_are_rounded_as_they_are_stored():
    layer = nn.Linear(8, 4, bias=False)
    made = fake(layer, grid=Integer(3, scale_dtype=torch.bfloat16), step="learned", pattern="*")["weight"]
    with torch.no_grad():
        made.learned["scale"].mul_(1.001)
    scale = codes(layer)["weight"].params["scale"]
    assert torch.equal(scale, scale.bfloat16().float())
    assert not torch.equal(scale, made.learned["scale"])
    assert torch.equal(ws.quantize.dequantize(coded(layer), "float32")["weight"], layer.weight)


def test_options_may_differ_by_tensor():
    model = network()
    made = fake(model, bits={"0.*": 2, "*": 8}, group={"2.*": 4, "*": None})
    assert [(one.grid.bits, one.grid.group) for one in made.values()] == [(2, None), (8, 4), (8, None)]


def test_under_autocast_and_for_the_head_by_name():
    model = network()
    fake(model, bits=4, step="learned", pattern="5.weight")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X).float().square().mean()
    loss.backward()
    assert model[5].parametrizations.weight.original.grad.isfinite().all()
    assert list(codes(model)) == ["5.weight"]


def test_fused_experts_are_the_matrices_that_they_are():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 3, 4))

    model = Experts()
    fake(model, bits=2, pattern="*")
    by_hand = [rtn(one.detach(), bits=2).values() for one in model.parametrizations.experts.original]
    assert torch.equal(model.experts, torch.stack(by_hand))
    assert torch.equal(ws.quantize.dequantize(coded(model))["experts"], model.experts)


def test_what_is_stored_is_a_copy_with_its_ties_and_without_ranges_of_inputs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[1].weight
    fake(model, bits=4, pattern="0.weight")
    fake_inputs(model, range="static", pattern="0.weight")
    stored = coded(model)
    assert stored.ties == {"2.weight": "1.weight"}
    assert [name for name in stored if "input_grid" in name] == []
    before = stored["1.weight"].clone()
    model[1].weight.data.zero_()
    assert torch.equal(stored["1.weight"], before)


def test_what_cannot_be_is_refused_before_anything_changes():
    model = network()
    with pytest.raises(Error, match=r"0\.weight: groups of 5 do not fill a row of 9 inputs"):
        fake(model, bits=4, group={"0.*": 5, "*": None})
    with pytest.raises(Error, match="no weight of two axes or more fits"):
        fake(model, pattern="x")
    with pytest.raises(Error, match="step is one of fitted, learned"):
        fake(model, step="guessed")
    with pytest.raises(Error, match="no step that could learn"):
        fake(model, grid=Levels(2), step="learned")
    with pytest.raises(Error, match=r"0\.weight \[6, 1, 3, 3\]: bits must be a whole number"):
        fake(model, bits=9)
    with pytest.raises(Error, match="nothing in this module is quantized"):
        codes(model)
    with pytest.raises(Error, match="nothing in this module is quantized"):
        coded(model)
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(Error, match="not finite"):
        fake(model)


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(Error, match="one tensor with"):
        fake(model, pattern="*")


def test_rows_of_zeros_stay_zero():
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    for options in ({}, {"step": "learned"}, {"symmetric": False}):
        other = copy.deepcopy(layer)
        fake(other, bits=2, pattern="*", **options)
        assert torch.equal(other.weight[1], torch.zeros(4))
        other.weight.sum().backward()
        assert other.parametrizations.weight.original.grad.isfinite().all()


def test_what_was_frozen_is_loaded_into_a_module_that_was_not():
    model = grids_on("learned")
    trained(model)
    calm(model)
    fresh = grids_on("learned")
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(X), model(X))
    assert all(top.learned is None for _, top, _ in standing(fresh))


def test_parts():
    assert over_inputs(torch.tensor([[1.0, 2.0]]), 3, 2).tolist() == [[1.0, 1.0, 2.0]]
    value = torch.tensor(3.0, requires_grad=True)
    made = scaled_gradient(value, 0.25)
    made.backward()
    assert (made.item(), value.grad.item()) == (3.0, 0.25)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "learned, affine"])  # its steps are float32
def test_in_float64_what_is_stored_is_what_the_module_computes_with(kind):
    model = grids_on(kind, torch.float64)
    trained(model)
    stored = ws.quantize.dequantize(coded(model))
    for index in (0, 2, 5):
        torch.testing.assert_close(stored[f"{index}.weight"], model[index].weight.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_weight_that_is_not_finite_is_named_and_changes_nothing(kind):
    model = network()
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    before = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(Error, match=r"5\.weight \[3, 6\]: there are values that are not finite"):
        KINDS[kind](model)
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert type(model[0]) is nn.Conv2d


def test_groups_that_do_not_fill_are_told_without_options_that_there_are_not():
    with pytest.raises(Error, match="or leave them out with pattern="):
        fake(nn.Linear(6, 4), group=4, pattern="*")


def test_a_step_too_small_for_its_dtype_divides_nothing_by_zero():
    layer = nn.Linear(4, 2)
    made = fake(layer, grid=Integer(3, scale_dtype=torch.float16), step="learned", pattern="*")["weight"]
    with torch.no_grad():
        made.learned["scale"].fill_(1e-9)
    layer.weight.sum().backward()
    assert (codes(layer)["weight"].params["scale"] == torch.finfo(torch.float16).tiny).all()
    assert made.learned["scale"].grad.isfinite().all()
    assert made.learned["scale"].grad.abs().sum() > 0


def test_attention_whose_weights_no_layer_calls_computes_with_codes():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    fake(attention, bits=2, pattern="*")
    assert list(codes(attention)) == ["in_proj_weight", "out_proj.weight"]
    plain = copy.deepcopy(attention)
    fold(plain)
    assert len(plain.in_proj_weight[0].unique()) <= 4
    torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")
def test_states_go_where_the_weight_is():
    model = grids_on("learned")
    calm(model)
    fresh = grids_on("learned").to("meta")
    fresh.load_state_dict(model.state_dict(), assign=False, strict=False)
    top = next(top for _, top, _ in standing(fresh))
    assert {value.device.type for value in (top.held, top.frozen, *top.fixed.tensors().values())} == {"meta"}


def test_beneath_are_the_weights_that_fit_and_ties_are_told():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    fake(model, pattern="0.weight")
    assert list(beneath(model, "*")) == ["0.weight", "1.weight", "2.weight"]
    assert list(beneath(model, "0.*")) == ["0.weight"]
    assert list(beneath(model, "1.*")) == ["1.weight"]
    with pytest.raises(Error, match="fits 'x'"):
        beneath(model, "x")
    model[2].weight = model[1].weight
    with pytest.raises(Error, match="one tensor with"):
        beneath(model, "*")


def test_clipping_and_where_steps_begin_are_those_of_rounding_afterwards():
    weight = network()[5].weight.detach()
    for options, clip in (({"clip": 8}, 8), ({"step": "learned"}, 16), ({"step": "learned", "clip": 20}, 20)):
        model = network()
        fake(model, bits=2, pattern="5.weight", **options)
        assert torch.equal(model[5].weight, rtn(weight, bits=2, clip=clip).values())
    assert not torch.equal(rtn(weight, bits=2, clip=8).values(), rtn(weight, bits=2).values())


def test_a_step_below_zero_turns_the_ends_of_the_grid_about():
    layer = nn.Linear(4, 1, bias=False)
    made = fake(layer, bits=2, step="learned", pattern="*")["weight"]
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor([[-1.5, 0.4, 1.8, 2.5]]))
        made.learned["scale"].fill_(-1)  # points at -1, 0, 1 and 2
    layer.weight.sum().backward()
    assert layer.weight.tolist() == [[-1, 0, 2, 2]]
    assert layer.parametrizations.weight.original.grad.tolist() == [[0, 1, 1, 0]]


def test_a_step_of_the_whole_tensor_learns_as_slowly_as_weights_share_it():
    torch.manual_seed(0)
    layer, upstream = nn.Linear(8, 4, bias=False), torch.randn(4, 8)
    made = fake(layer, grid=Integer(3, per_tensor=True), step="learned", pattern="*")["weight"]
    (layer.weight * upstream).sum().backward()
    step, weight = made.learned["scale"].item(), layer.parametrizations.weight.original.detach()
    place = weight / step
    slope = torch.where((place >= -4) & (place <= 3), place.round() - place, place.clamp(-4, 3))
    assert made.learned["scale"].grad.item() == pytest.approx(
        (slope * upstream).sum().item() / math.sqrt(32 * 3), rel=1e-4
    )


def test_a_grid_that_stands_still_has_its_own_numbers():
    layer = nn.Linear(4, 2)
    made = fake(layer, grid=Integer(3, symmetric=False, zero="float"), step="learned", pattern="*")["weight"]
    learned, before = dict(made.learned.items()), layer.weight.detach().clone()
    made.fix(layer.parametrizations.weight.original)
    for value in learned.values():
        value.data.mul_(2)
    assert torch.equal(layer.weight, before)
