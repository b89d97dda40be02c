"""Channels that learn their bits: the quantizer by hand, its gradients, sizes, and cutting what has none."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith import Error
from weightsmith.graph import trace
from weightsmith.quantize.training import coded, dead_units, self_compressing, size, without_dead
from weightsmith.quantize.training._self_compressing import _Alive

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 2), nn.SiLU(),
        nn.Flatten(), nn.Linear(20, 7), nn.GELU(), nn.Linear(7, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Two layers that write to one stream."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last((self.first(x) + self.second(x)).relu())


def by_hand(weight: float, bits: float, exponent: float) -> float:
    half = 2 ** (bits - 1)
    return 2**exponent * round(min(max(weight / 2**exponent, -half), half - 1))


def test_the_quantizer_by_hand():
    layer = nn.Linear(8, 5, bias=False)
    made = self_compressing(layer, pattern="*")["weight"]
    bits, exponents = [0.0, 1.0, 2.5, 4.0, 8.0], [-2.0, -3.3, -2.5, -4.0, -9.0]
    with torch.no_grad():
        made.bits.copy_(torch.tensor(bits))
        made.exponent.copy_(torch.tensor(exponents))
    original = layer.parametrizations.weight.original
    for row in range(5):
        for column in range(8):
            wanted = by_hand(original[row, column].item(), bits[row], exponents[row])
            assert layer.weight[row, column].item() == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(ws.quantize.dequantize(coded(layer))["weight"], layer.weight)


def test_gradients_reach_bits_and_exponents_through_limits_and_step():
    layer = nn.Linear(6, 1, bias=False).double()
    made = self_compressing(layer, pattern="*")["weight"]
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor([[-3.0, 0.3, 0.6, 1.4, 2.9, -0.2]]))
        made.bits.fill_(2.5)
        made.exponent.fill_(-0.7)
    upstream = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.7, 1.1]], dtype=torch.float64)
    (layer.weight * upstream).sum().backward()
    half, step = 2**1.5, 2**-0.7
    of_bits = of_exponent = 0.0
    for weight, g in zip(layer.parametrizations.weight.original[0].tolist(), upstream[0].tolist(), strict=True):
        place = weight / step
        level = min(max(place, -half), half - 1)
        whole = round(level)
        if place < -half:
            of_bits += g * step * -half * math.log(2)
        elif place > half - 1:
            of_bits += g * step * half * math.log(2)
        within = -half <= place <= half - 1
        of_exponent += g * math.log(2) * step * (whole - (place if within else 0))
    assert made.bits.grad.item() == pytest.approx(of_bits)
    assert made.exponent.grad.item() == pytest.approx(of_exponent)


def test_it_begins_within_half_a_step_of_the_weights():
    layer = nn.Linear(20, 4)
    plain = layer.weight.detach().clone()
    self_compressing(layer, pattern="*")
    step = plain.abs().amax(1, keepdim=True) / 128
    assert ((layer.weight - plain).abs() <= 1.001 * step).all()


def test_size_is_the_mean_of_bits_and_counts_live_inputs_alone():
    model = network()
    graph = trace(model, X)
    made = self_compressing(model, graph=graph)
    assert size(model, graph).item() == pytest.approx(8)
    with torch.no_grad():
        made["0.weight"].bits[:2] = 0
        made["3.weight"].bits[0] = -1
        made["6.weight"].bits.copy_(torch.tensor([4.0, 4, 4, 4, 2, 2, 2]))
    total = 9 * 6 + 24 * 5 + 20 * 7 + 7 * 3
    plain = 9 * 4 * 8 + 24 * 4 * 8 + 20 * 22 + 7 * 3 * 8
    assert size(model).item() == pytest.approx(plain / total)
    live = 9 * 4 * 8 + 16 * 4 * 8 + 16 * 22 + 7 * 3 * 8
    assert size(model, graph).item() == pytest.approx(live / total)
    size(model, graph).backward()
    assert made["3.weight"].bits.grad.tolist() == pytest.approx([0.0, *[16 / total] * 4])


def kill(made, names) -> None:
    with torch.no_grad():
        for name, rows in names.items():
            made[name].bits[rows] = 0


def test_without_dead_channels_the_outputs_are_the_same():
    model = network()
    graph = trace(model, X)
    with torch.no_grad():
        model(X)  # running statistics that are not those of a fresh module
    made = self_compressing(model, bits=6, graph=graph)
    kill(made, {"0.weight": [1, 4], "3.weight": [0], "6.weight": [2, 3, 6]})
    model.eval()
    before = model(X)
    after = without_dead(model, graph, X)
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)
    shapes = [tuple(model[index].weight.shape) for index in (0, 1, 3, 6, 8)]
    assert shapes == [(4, 1, 3, 3), (4,), (4, 4, 2, 2), (4, 16), (3, 4)]
    assert sorted(after.sizes.values()) == [4, 4, 4]
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_a_unit_dies_when_all_that_write_to_it_are_dead():
    model, x = Residual(), torch.randn(5, 4)
    graph = trace(model, x)
    made = self_compressing(model, graph=graph)
    kill(made, {"first.weight": [0, 1, 2], "second.weight": [1, 2, 5]})
    (space,) = graph.spaces
    assert dead_units(model, graph)[space].tolist() == [0, 3, 4, 5]
    assert model.first.bias[1] == 0
    assert model.first.bias[0] != 0
    before = model(x)
    without_dead(model, graph, x)
    torch.testing.assert_close(model(x), before)
    assert model.last.weight.shape == (2, 4)


def test_where_all_are_dead_one_is_kept():
    model, x = Residual(), torch.randn(5, 4)
    graph = trace(model, x)
    kill(self_compressing(model, graph=graph), {"first.weight": slice(None), "second.weight": slice(None)})
    before = model(x)
    without_dead(model, graph, x)
    torch.testing.assert_close(model(x), before)
    assert model.last.weight.shape == (2, 1)


def test_a_function_that_moves_zero_is_found():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2)), torch.randn(5, 4)
    graph = trace(model, x)
    kill(self_compressing(model, graph=graph), {"0.weight": [0, 1]})
    with pytest.raises(Error, match="does not leave zero at zero"):
        without_dead(model, graph, x)


def test_copies_have_gates_of_their_own():
    model, x = Residual(), torch.randn(5, 4)
    made = self_compressing(model, graph=trace(model, x))
    other = copy.deepcopy(model)
    kill(made, {"first.weight": [1], "second.weight": [1]})
    assert model.first.bias[1] == 0
    assert other.first.bias[1] != 0


def test_the_penalty_takes_bits_away_and_the_task_holds_on_to_some():
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    wanted = x[:, :2].prod(1, keepdim=True)
    found = []
    for gamma in (0.0, 0.02, 0.1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
        graph = trace(model, x)
        made = self_compressing(model, graph=graph)
        widths = [p for one in made.values() for p in (one.bits, one.exponent)]
        others = [p for name, p in model.named_parameters() if not name.endswith(("bits", "exponent"))]
        optimizer = torch.optim.Adam([{"params": widths, "lr": 0.1}, {"params": others}], lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - wanted).square().mean()
            (loss + gamma * size(model, graph)).backward()
            optimizer.step()
        found.append(size(model, graph).item())
        assert loss < 0.5 * wanted.square().mean()
    assert found[0] > found[1] > found[2]
    assert found[2] < 4


def test_bits_above_the_most_come_back_and_bits_of_none_stay_away():
    layer = nn.Linear(6, 2)
    made = self_compressing(layer, pattern="*")["weight"]
    with torch.no_grad():
        made.bits.copy_(torch.tensor([8.5, -0.5]))
    assert size(layer).item() == 4
    (size(layer) + layer.weight.square().sum()).backward()
    assert made.bits.grad.tolist() == [0.5, 0.0]


def test_what_cannot_be_is_refused():
    model = network()
    with pytest.raises(Error, match="bits at first"):
        self_compressing(model, bits=9)
    with pytest.raises(Error, match="no weight of this module learns its bits"):
        size(model)
    with pytest.raises(ValueError):
        self_compressing(model, graph=trace(Residual(), torch.randn(5, 4)))
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_rows_of_fused_experts_have_bits_each():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.Parameter(torch.randn(2, 3, 4))

    model = Experts()
    made = self_compressing(model, pattern="*")["experts"]
    assert made.bits.shape == (6,)
    kill({"experts": made}, {"experts": [4]})
    assert [(row == 0).all().item() for row in model.experts.flatten(0, 1)] == [False] * 4 + [True, False]
    assert torch.equal(ws.quantize.dequantize(coded(model))["experts"], model.experts)


def test_rows_of_zeros_can_learn():
    layer, x = nn.Linear(4, 2, bias=False), torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for rows in (slice(1, 2), slice(None)):
        with torch.no_grad():
            layer.weight.copy_(torch.eye(2, 4))
            layer.weight[rows] = 0
        model = copy.deepcopy(layer)
        self_compressing(model, pattern="*")
        assert (model.weight[rows] == 0).all()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :2]).square().mean()
            loss.backward()
            optimizer.step()
        assert loss < 0.02


def test_an_error_leaves_the_module_as_it_was():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for between in (nn.Sigmoid(), nn.LayerNorm(6)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 2))
        graph = trace(model, x)
        kill(self_compressing(model, graph=graph), {"0.weight": [0, 1]})
        before, names = model(x), [name for name, _ in model.named_parameters()]
        with pytest.raises(Error, match="the module is as it was"):
            without_dead(model, graph, x)
        assert torch.equal(model(x), before)
        assert [name for name, _ in model.named_parameters()] == names


def test_outputs_of_any_form_are_compared():
    class Named(Residual):
        def forward(self, x):
            return {"y": [self.last((self.first(x) + self.second(x)).sigmoid())]}

    class Silent(Residual):
        def forward(self, x):
            self.seen = super().forward(x)
            return "done"

    x = torch.randn(5, 4)
    for kind, words in ((Named, "outputs differ"), (Silent, "no tensors to compare")):
        graph = trace(Residual(), x)
        model = kind()
        kill(self_compressing(model, graph=graph), {"first.weight": [0], "second.weight": [0]})
        with pytest.raises(Error, match=words):
            without_dead(model, graph, x)


def test_spaces_of_one_size_keep_one_size():
    model, x = Residual(), torch.randn(5, 4)
    graph = trace(model, x)
    kill(self_compressing(model, graph=graph), {"first.weight": [0, 1], "second.weight": [0, 1]})
    (name,) = graph.spaces
    twin = replace(graph.spaces[name], name="twin")
    alike = replace(graph, spaces={**graph.spaces, "twin": twin}, alike=((name, "twin"),))
    assert dead_units(model, graph)[name].tolist() == [2, 3, 4, 5]
    assert dead_units(model, alike) == {}
    assert size(model, alike).item() == pytest.approx(size(model).item())
    coarse = replace(graph, spaces={name: replace(graph.spaces[name], multiple=3)})
    assert len(dead_units(model, coarse).get(name, range(6))) == 6
    kill(self_compressing_of(model), {"first.weight": [2, 3], "second.weight": [2, 3]})
    assert dead_units(model, coarse)[name].tolist() == [0, 4, 5]


def self_compressing_of(model):
    return {name: model.get_submodule(name.split(".")[0]).parametrizations.weight[0]
            for name in ("first.weight", "second.weight")}  # fmt: skip


def test_what_belongs_to_no_unit_is_let_be():
    layer = nn.Linear(2, 2)
    made = self_compressing(layer, pattern="*")["weight"]
    kill({"weight": made}, {"weight": [0]})
    gate = _Alive([(made, torch.tensor([0, 1]))], torch.tensor([0, -1, 1]), 2)
    assert gate(torch.ones(3)).tolist() == [0, 1, 1]
