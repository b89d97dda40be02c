"""What masks in a module share, and what all of them promise: fold, copies, state, bf16, layers for themselves."""

import copy

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith import Error
from weightsmith.adapt import fold
from weightsmith.prune.sparse import (
    advance,
    bilevel,
    nm_decay,
    on_sphere,
    score_masks,
    signed_supermask,
    weights_of,
)
from weightsmith.prune.sparse._parametrizations import Straight, all_but_smallest, kept_wholes, snapshot, standing
from weightsmith.prune.sparse._score_masks import Scored

X = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(1))
MASKS = {
    "nm_decay": lambda module: nm_decay(module, "1:3", end=0.5),
    "nm_decay, structure": lambda module: nm_decay(module, "1:3", decay="structure"),
    "score_masks": lambda module: score_masks(module, 0.5, start="random", restriction=None),
    "score_masks, restricted": lambda module: score_masks(module, 0.5),
    "signed_supermask": lambda module: signed_supermask(module, sparsity=0.5),
    "bilevel": lambda module: bilevel(module, 0.5),
    "on_sphere": on_sphere,
}
SCHEDULED = ("nm_decay", "nm_decay, structure", "score_masks", "score_masks, restricted", "bilevel")


def network(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, stride=3), nn.ELU(), nn.Conv2d(3, 6, 2), nn.ELU(), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype)


def trained(module: nn.Module, optimizer=torch.optim.Adam, steps: int = 3, at: float = 0.3) -> float:
    learning = optimizer([p for p in module.parameters() if p.requires_grad], lr=0.05)
    target = torch.arange(len(X)) % 3
    for _ in range(steps):
        learning.zero_grad()
        loss = nn.functional.cross_entropy(module(X.to(next(module.parameters()).dtype)).float(), target)
        loss.backward()
        learning.step()
        if any(hasattr(part, "progress") for part in module.modules()):
            advance(module, at)
    return loss.item()


@pytest.mark.parametrize("kind", MASKS)
def test_fold_leaves_a_plain_module_with_the_same_outputs(kind):
    model = network()
    made = MASKS[kind](model)
    assert list(made) == ["0.weight", "2.weight", "5.weight"]
    trained(model)
    before = model(X)
    fold(model)
    assert torch.equal(model(X), before)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in network().named_parameters()}
    assert not list(standing(model, nn.Module))


@pytest.mark.parametrize("kind", MASKS)
def test_a_copy_is_a_model_of_its_own(kind):
    model = network()
    MASKS[kind](model)
    trained(model)
    before = model(X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), before)
    trained(other, steps=4, at=0.9)
    assert not torch.equal(other(X), before)
    fold(other)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("kind", MASKS)
def test_the_state_dict_holds_all_of_it(kind):
    model, other = network(), network()
    MASKS[kind](model)
    trained(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    MASKS[kind](other)
    assert not torch.equal(other(X), model(X))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("kind", MASKS)
def test_the_state_dict_goes_through_a_file_of_tensors(kind, tmp_path):
    model, other = network(), network()
    for one in (model, other):
        MASKS[kind](one)
    trained(model)
    ws.open(model.state_dict()).save(tmp_path / "state.safetensors")
    other.load_state_dict(ws.open(tmp_path / "state.safetensors").to_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("kind", MASKS)
def test_any_optimizer_trains_it(kind, optimizer):
    model = network()
    MASKS[kind](model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, optimizer, steps=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("kind", MASKS)
def test_in_bfloat16_it_stays_bfloat16_and_learns_in_float32(kind):
    model = network(torch.bfloat16)
    MASKS[kind](model)
    assert model[5].weight.dtype == torch.bfloat16
    extra = [p for name, p in model.named_parameters() if "parametrizations" in name and "original" not in name]
    assert all(p.dtype == torch.float32 for p in extra)
    trained(model)
    assert all(p.isfinite().all() for p in model.parameters())
    fold(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("kind", SCHEDULED)
def test_progress_is_not_rounded_by_a_cast(kind):
    model = network()
    MASKS[kind](model)
    advance(model, 0.123456789)
    model.to(torch.bfloat16)
    other = network()
    MASKS[kind](other)
    other.load_state_dict(model.state_dict())
    assert {part.progress for part in other.modules() if hasattr(part, "progress")} == {0.123456789}


@pytest.mark.parametrize("kind", MASKS)
def test_layers_share_nothing(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    made = MASKS[kind](model)
    assert len({id(one) for one in made.values()}) == 2
    ours = [{id(tensor) for tensor in (*one.parameters(), *one.buffers())} for one in made.values()]
    assert not ours[0] & ours[1]
    assert not torch.equal(model[0].weight, model[1].weight)


@pytest.mark.parametrize("kind", MASKS)
def test_putting_it_there_touches_neither_modes_nor_random_numbers(kind):
    model = network()
    model[0].eval()
    modes, state = [part.training for part in model], torch.get_rng_state()
    MASKS[kind](model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model] == modes
    before = model(X)
    assert torch.equal(model.eval()(X), before)
    assert torch.equal(model.train()(X), before)


@pytest.mark.parametrize("kind", MASKS)
def test_the_parameters_that_an_optimizer_knows_stay_the_same_objects(kind):
    model = network()
    known = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    MASKS[kind](model)
    assert model[5].parametrizations.weight.original is known["5.weight"]
    model(X).square().mean().backward()
    before = known["5.weight"].detach().clone()
    optimizer.step()
    assert torch.equal(known["5.weight"], before) != known["5.weight"].requires_grad
    fold(model)
    assert all(parameter is known[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["score_masks", "signed_supermask"])
def test_what_is_frozen_does_not_move_by_a_gradient_of_before(kind):
    model = network()
    model(X).square().mean().backward()
    MASKS[kind](model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MASKS)
def test_zero_weights_and_zero_gradients_give_no_nan(kind, dtype):
    model = network(dtype)
    for parameter in model.parameters():
        parameter.data.zero_()
    MASKS[kind](model)
    extra = [p for name, p in model.named_parameters() if "parametrizations" in name and "original" not in name]
    assert all(p.dtype == torch.promote_types(dtype, torch.float32) for p in extra)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for scale in (0.0, 1.0, 1.0):
        optimizer.zero_grad()
        ((model(X.to(dtype)) - 1).square().mean() * scale).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
    assert model(X.to(dtype)).isfinite().all()


@pytest.mark.parametrize("kind", MASKS)
def test_a_module_that_stands_in_two_places_has_one_mask(kind):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    assert list(weights_of(model, "2.*")) == ["2.weight"]
    assert list(weights_of(model, "*.weight")) == ["0.weight"]
    assert list(MASKS[kind](model)) == ["0.weight"]
    before = model(torch.ones(2, 6))
    fold(model)
    assert torch.equal(model(torch.ones(2, 6)), before)
    assert model[0] is model[2]


def test_weights_of_finds_the_usual_ones_and_refuses_tied_ones():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    model[3].weight = model[0].weight
    assert list(weights_of(model, "1.*")) == ["1.weight"]
    with pytest.raises(Error, match=r"one tensor with 3\.weight"):
        weights_of(model, "0.weight")
    with pytest.raises(Error, match="no weight of two axes"):
        weights_of(model, "2.*")
    assert not any("parametrizations" in name for part in [network()] for name in weights_of(part))


def test_weights_with_a_mask_do_not_get_a_second_one():
    model = network()
    nm_decay(model, "1:3", pattern="5.*")
    assert list(weights_of(model)) == ["0.weight", "2.weight"]
    nm_decay(model, "1:3", pattern=["0.weight", "2.weight"])
    with pytest.raises(Error, match="no weight of two axes"):
        score_masks(model)


def test_advance_refuses_what_has_no_schedule():
    with pytest.raises(Error, match="no mask of this module"):
        advance(network(), 0.5)
    model = network()
    nm_decay(model, "1:3")
    with pytest.raises(Error, match="between 0 and 1"):
        advance(model, 1.01)
    with pytest.raises(Error, match="between 0 and 1"):
        advance(model, float("nan"))


def test_rows_and_columns_go_by_their_mean_score():
    score = torch.tensor([[9.0, 0.0, 0.0], [4.0, 4.0, 0.0], [1.0, 1.0, 1.0]])
    assert kept_wholes(score, 1 / 3, "row").flatten().tolist() == [True, True, False]
    assert kept_wholes(score, 2 / 3, "column").flatten().tolist() == [True, False, False]
    cube = torch.zeros(2, 3, 2, 2)
    cube[:, 1] = 1
    assert kept_wholes(cube, 2 / 3, "column").shape == (1, 3, 1, 1)
    assert kept_wholes(cube, 2 / 3, "column").flatten().tolist() == [False, True, False]


def test_the_score_gets_the_gradient_of_the_mask():
    weight = torch.tensor([[2.0, -3.0, 5.0]], requires_grad=True)
    score = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    gradient = torch.tensor([[0.5, 7.0, -1.0]])
    out = Straight.apply(weight, score, torch.tensor([[True, False, True]]))
    out.backward(gradient)
    assert out.tolist() == [[2.0, 0.0, 5.0]]
    assert score.grad.tolist() == [[1.0, -21.0, -5.0]]
    assert weight.grad.tolist() == [[0.5, 0.0, -1.0]]
    out = Straight.apply(weight, score, torch.tensor([[-1, 0, 1]], dtype=torch.int8))
    weight.grad = score.grad = None
    out.backward(gradient)
    assert out.tolist() == [[-2.0, 0.0, 5.0]]
    assert score.grad.tolist() == [[1.0, -21.0, -5.0]]
    assert weight.grad.tolist() == [[-0.5, 0.0, -1.0]]


def test_all_but_smallest_takes_tensors_together_and_leaves_the_module():
    model = network()
    before = snapshot(model)
    masks = all_but_smallest(before, ["0.weight", "5.weight"], 0.4)
    sizes = torch.cat([model[0].weight.abs().flatten(), model[5].weight.abs().flatten()])
    kept = torch.cat([masks["0.weight"].flatten(), masks["5.weight"].flatten()])
    assert int(kept.sum()) == len(sizes) - round(0.4 * len(sizes))
    assert sizes[kept].min() > sizes[~kept].max()
    model[0].weight.data.zero_()
    assert before["0.weight"].any()


def test_standing_names_the_weight():
    model = network()
    found = score_masks(model, 0.5)
    assert standing(model, Scored) == found
    lone = nn.Linear(2, 2)
    bilevel(lone, 0.5)
    assert list(standing(lone, Scored)) == ["weight"]


@pytest.mark.parametrize("kind", MASKS)
def test_strides_do_not_matter(kind):
    plain, strided = network(), network()
    for part in (strided[0], strided[2], strided[5]):
        part.weight = nn.Parameter(part.weight.detach().transpose(0, 1).contiguous().transpose(0, 1))
    for model in (plain, strided):
        MASKS[kind](model)
        trained(model)
        fold(model)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(strided.get_parameter(name), value)


def test_a_single_weight():
    for kind in ("score_masks", "signed_supermask", "bilevel", "on_sphere"):
        model = nn.Linear(1, 1)
        MASKS[kind](model)
        assert model(torch.ones(1, 1)).isfinite().all()
