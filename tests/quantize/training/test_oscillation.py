"""Steps from means, weights held where they are sure, jumps counted, and queries and keys as one product."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith import Error
from weightsmith.adapt import fold
from weightsmith.quantize.training import Oscillations, calm, coded, codes, fake, joint_scores, statistical
from weightsmith.quantize.training._oscillation import turns


def layer(inputs: int = 12, outputs: int = 5) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=False)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [None, 4])
def test_statistical_is_the_formula(bits, group):
    model = layer()
    plain = model.weight.detach().clone()
    statistical(model, bits=bits, group=group, pattern="*")
    half = 2 ** (bits - 1)
    size = group or 12
    for row in range(5):
        for start in range(0, 12, size):
            run = plain[row, start : start + size].tolist()
            scale = 2 * sum(map(abs, run)) / size
            for column, value in enumerate(run, start):
                clipped = min(max(value / scale, -1 + 1e-6), 1 - 1e-6)
                wanted = scale * (round(clipped * half - 0.5) + 0.5) / half
                assert model.weight[row, column].item() == pytest.approx(wanted, rel=1e-5)


def test_gradients_pass_where_weights_are_clipped():
    model = layer()
    with torch.no_grad():
        model.weight[0, 0] = 10
    statistical(model, bits=2, pattern="*")
    model.weight.sum().backward()
    assert torch.equal(model.parametrizations.weight.original.grad, torch.ones(5, 12))


def test_a_row_of_zeros_stays_as_good_as_zero():
    model = layer()
    with torch.no_grad():
        model.weight[2] = 0
    statistical(model, bits=2, pattern="*")
    assert model.weight[2].abs().max() < 1e-30
    assert model.weight.isfinite().all()
    assert torch.equal(ws.quantize.dequantize(coded(model))["weight"], model.weight)


@pytest.mark.parametrize("put", [lambda m: statistical(m, bits=2, pattern="*"), lambda m: fake(m, bits=3, pattern="*"),
                                 lambda m: fake(m, bits=2, grid="levels", pattern="*")])  # fmt: skip
def test_calm_freezes_all_but_weights_at_a_border(put):
    model = layer(64, 8)
    put(model)
    top = model.parametrizations.weight[0]
    params = top.params(top.rows(model.parametrizations.weight.original))
    points = top.coded_rows(torch.linspace(-5, 5, 20001).expand(8, -1)[:, :20001], params) if top.grid.group else None
    assert points is None
    rows = model.parametrizations.weight.original.detach()
    before = model.weight.detach().clone()
    shares = calm(model, margin=0.1)
    assert torch.equal(model.weight, before)
    assert 0.3 < shares["weight"] < 1
    table = torch.stack([top.coded_rows(torch.full((8, 64), value), params).values()[:, 0]
                         for value in torch.linspace(-3, 3, 4001)], 1)  # fmt: skip
    for row in range(8):
        levels = table[row].unique().sort().values
        borders = (levels[1:] + levels[:-1]) / 2
        step = (levels[-1] - levels[0]) / (2**top.grid.bits - 1)
        distance = (rows[row].unsqueeze(1) - borders).abs().amin(1) / step
        clear = (distance - 0.1).abs() > 1e-3
        assert torch.equal(top.frozen[row][clear], (distance > 0.1)[clear])


def test_frozen_weights_stand_still_whatever_the_optimizer_does_and_the_others_learn():
    torch.manual_seed(1)
    model = layer(32, 8)
    statistical(model, bits=2, pattern="*")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    x = torch.randn(64, 32)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()

    for _ in range(5):
        step()
    calm(model, margin=0.1)
    top = model.parametrizations.weight[0]
    masks, free = [top.frozen.clone()], model.weight.detach().clone()
    start = codes(model)["weight"].codes.clone()
    for _ in range(20):
        step()
        calm(model, margin=0.1)
        masks.append(top.frozen.clone())
        now = codes(model)["weight"].codes
        assert torch.equal(now[masks[0]], start[masks[0]])
        assert torch.equal(model.weight[masks[0]], free[masks[0]])
    assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(masks))
    assert not torch.equal(codes(model)["weight"].codes, start)
    gradient = model.parametrizations.weight.original.grad
    assert (gradient[masks[-2]] == 0).all()


def test_a_wider_margin_thaws_nothing():
    model = layer(32, 8)
    fake(model, bits=3, pattern="*")
    few = calm(model, margin=0.2)
    assert calm(model, margin=0.4) == few
    assert calm(model, margin=0.01)["weight"] > few["weight"]


def test_calm_ends_most_turns():
    torch.manual_seed(2)
    x, wanted = torch.randn(256, 16), torch.randn(16, 4)
    rates = []
    for freeze in (False, True):
        torch.manual_seed(3)
        model = layer(16, 4)
        fake(model, bits=2, step="learned", pattern="*")
        optimizer, generator = torch.optim.Adam(model.parameters(), lr=0.03), torch.Generator().manual_seed(0)
        counter, total = Oscillations(model), 0.0
        for step in range(150):
            part = torch.randint(256, (16,), generator=generator)
            optimizer.zero_grad()
            (model(x[part]) - x[part] @ wanted).square().mean().backward()
            optimizer.step()
            if freeze and step >= 75:
                calm(model)
            shares = counter.update()
            total += shares["weight"] if step > 80 else 0
        rates.append(total)
    assert rates[0] > 0
    assert rates[1] < rates[0] / 5


def test_turns_are_changes_against_the_last_change():
    model = nn.Linear(3, 1, bias=False)
    model.weight = nn.Parameter(torch.tensor([[1.0, 1.0, 1.0]]))
    fake(model, bits=2, pattern="*")["weight"].fix(model.parametrizations.weight.original)
    original = model.parametrizations.weight.original
    counter = Oscillations(model, momentum=0.5)
    seen = []
    for values in ([0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.0, 1.0, 0.0]):
        original.data = torch.tensor([values])
        seen.append(counter.update()["weight"])
    assert seen == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert counter.rate["weight"].tolist() == [[0.375, 0.0, 0.5]]


def test_a_grid_that_moves_under_the_weights_is_no_change_of_codes():
    model = layer()
    fake(model, bits=3, pattern="*")
    before = codes(model)["weight"]
    model.parametrizations.weight.original.data.mul_(2)
    turned, direction = turns(before, codes(model)["weight"], torch.zeros(5, 12, dtype=torch.int8))
    assert not turned.any()
    assert not direction.any()


def test_what_cannot_be_calmed_is_refused():
    model = layer()
    with pytest.raises(Error, match="no weight of this module is quantized"):
        calm(model)
    fake(model, pattern="*")
    with pytest.raises(Error, match="0 or more steps"):
        calm(model, -1.0)


@pytest.mark.parametrize("kept", [4, 2, 1])
def test_joint_scores_are_those_of_queries_and_keys(kept):
    torch.manual_seed(0)
    query, key, x, y = nn.Linear(6, 12), nn.Linear(6, 3 * kept), torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    made = joint_scores(query, key, heads=4, bits=None)
    queries = query(x).unflatten(-1, (4, 3)).transpose(-2, -3)
    keys = key(y).unflatten(-1, (kept, 3)).transpose(-2, -3).repeat_interleave(4 // kept, -3)
    wanted = (queries @ keys.mT / math.sqrt(3)).softmax(-1)
    torch.testing.assert_close(made(x, y).softmax(-1), wanted, rtol=1e-4, atol=1e-6)
    assert made(x).shape == (2, 4, 5, 5)


def test_the_product_is_what_is_quantized_and_both_factors_learn():
    torch.manual_seed(0)
    query, key, x = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False), torch.randn(5, 6)
    product = (query.weight.view(2, 2, 6).mT @ key.weight.view(2, 2, 6)).flatten(0, 1).detach()
    plain = nn.Linear(6, 12, bias=False)
    plain.weight = nn.Parameter(product.clone())
    statistical(plain, bits=2, pattern="*")
    made = joint_scores(query, key, heads=2, bits=2)
    torch.testing.assert_close(made.weight, plain.weight)
    made(x).square().sum().backward()
    stack = made.parametrizations.weight
    assert stack.original0.grad.abs().sum() > 0
    assert stack.original1.grad.abs().sum() > 0
    assert list(codes(made)) == ["weight"]
    assert torch.equal(codes(made)["weight"].values(), made.weight)
    before, folded = made(x), copy.deepcopy(made)
    fold(folded)
    assert torch.equal(folded(x), before)
    assert [name for name, _ in folded.named_parameters()] == ["weight"]
    assert torch.equal(query.weight, nn.Parameter(query.weight.detach()))


def test_assigning_a_product_finds_factors():
    torch.manual_seed(0)
    made = joint_scores(nn.Linear(6, 4), nn.Linear(6, 4), heads=2, bits=None)
    wanted = torch.randn(2, 6, 2) @ torch.randn(2, 2, 6)
    made.weight = wanted.flatten(0, 1)
    torch.testing.assert_close(made.weight, wanted.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(Error, match="3 heads do not divide"):
        joint_scores(nn.Linear(6, 4), nn.Linear(6, 4), heads=3)
    with pytest.raises(Error, match="do not fit together"):
        joint_scores(nn.Linear(6, 4), nn.Linear(5, 4), heads=2)


def test_heads_wider_than_their_inputs_take_products_too():
    torch.manual_seed(0)
    made = joint_scores(nn.Linear(2, 6), nn.Linear(2, 6), heads=2, bits=None)
    wanted = torch.randn(4, 2)
    made.weight = wanted
    torch.testing.assert_close(made.weight, wanted, rtol=1e-4, atol=1e-5)


def test_factors_are_copies_of_the_layers():
    query, key = nn.Linear(6, 4), nn.Linear(6, 4)
    stack = joint_scores(query, key, heads=2, bits=None).parametrizations.weight
    assert torch.equal(stack.original0, query.weight)
    assert torch.equal(stack.original1, key.weight)
    stack.original0.data.zero_()
    stack.original1.data.zero_()
    assert query.weight.abs().sum() > 0
    assert key.weight.abs().sum() > 0
