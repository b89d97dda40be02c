"""Steps that learn through a whole model: what moves, what does not, and what it is good for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.quantize import dequantize, end_to_end, rtn
from weightsmith.quantize._end_to_end import _steppers
from weightsmith.quantize.grids import Integer
from weightsmith.weights import Held, Weights, open


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))


def data(net: nn.Module, count: int = 4, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs, and what the network says of them."""
    inputs = [torch.randn(32, 8, generator=torch.Generator().manual_seed(start + i)) for i in range(count)]
    return [(x, net(x).argmax(1)) for x in inputs]


def loss(net: nn.Module, found: Weights, batches: Any) -> float:
    made = copy.deepcopy(net)
    dequantize(found).load_into(made)
    with torch.no_grad():
        return float(sum(functional.cross_entropy(made(x), y) for x, y in batches))


def changed(coded: Weights, tensors: dict[str, Tensor]) -> Weights:
    """The same codes with some tensors in the place of others."""
    nodes = {name: Held(tensors[name]) if name in tensors else coded.node(name) for name in coded}
    return Weights(nodes, coded.lineage, coded.files, coded.metadata)


def apart(net: nn.Module, found: Weights, batches: Any) -> float:
    """The divergence from what the network itself says."""
    made = copy.deepcopy(net)
    dequantize(found).load_into(made)
    with torch.no_grad():
        pairs = [(made(x).log_softmax(1), net(x).log_softmax(1)) for x, _ in batches]
    return float(sum(functional.kl_div(one, other, log_target=True, reduction="sum") for one, other in pairs))


GRIDS: list[dict[str, Any]] = [
    {"bits": 2, "group": 4},
    {"bits": 2, "group": 4, "symmetric": False},
    {"bits": 3},
    {"bits": 2, "group": 8, "scale_dtype": "bfloat16"},
    {"grid": Integer(bits=2, group=4, symmetric=False, zero="float")},
]


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_loses_less_on_other_inputs_and_codes_stay(grid: dict[str, Any], teacher: bool):
    net = network()
    before = copy.deepcopy(net.state_dict())
    coded = rtn(net, pattern="*.weight", **grid)
    found = end_to_end(coded, data(net), net, teacher=teacher, steps=100, lr=0.01)
    judge = apart if teacher else loss
    assert judge(net, found, data(net, start=9)) < judge(net, coded, data(net, start=9))
    assert list(found) == list(coded)
    assert found.metadata == coded.metadata
    for name in found:
        assert torch.equal(found[name], coded[name]) != name.endswith("_scale"), name
        assert found[name].dtype == coded[name].dtype
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training


def test_values_are_those_that_codes_stand_for():
    net = network()
    for grid in GRIDS:
        coded = rtn(net, pattern="*.weight", **grid)
        for name, one in _steppers(coded, net).items():
            assert torch.equal(one.values().detach(), dequantize(coded, torch.float32)[name])
            with torch.no_grad():
                one.factor.mul_(torch.rand(one.factor.shape) + 0.5)
            scaled = {f"{name}_scale": one.scale().detach().to(coded[f"{name}_scale"].dtype)}
            again = dequantize(changed(coded, scaled), torch.float32)[name]
            torch.testing.assert_close(one.values().detach(), again)


def test_the_first_step_goes_against_the_slope():
    """Adam's first step moves every factor by the rate, against the sign of its slope, found by small differences."""
    net = network()
    batch = [(x.double(), y) for x, y in data(net, 1)]
    net = net.double()
    coded = rtn(net, pattern="2.weight", bits=2, group=8)
    found = end_to_end(coded, batch, net, steps=1, lr=1e-3)
    name = "2.weight_scale"
    moved = found[name] / coded[name] - 1
    for row in range(5):
        sides = []
        for by in (1e-5, -1e-5):
            scale = coded[name].clone()
            scale[row, 0] *= 1 + by
            tensors = changed(coded, {name: scale})
            sides.append(loss(net, tensors, batch))
        assert torch.sign(moved[row, 0]) == -torch.sign(torch.tensor(sides[0] - sides[1]))
        assert abs(float(moved[row, 0])) == pytest.approx(1e-3, rel=1e-3)


class Tied(nn.Module):
    """Words in and out by one matrix, a running mean, and a layer that is not asked."""

    def __init__(self):
        super().__init__()
        self.words, self.layer, self.idle = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(torch.tanh(self.layer(self.words(x))))


def test_tied_tensors_learn_once_and_others_stay():
    torch.manual_seed(0)
    net: Any = Tied()
    for names, other in ((["words.weight", "layer.weight", "idle.weight"], {}), (["words.weight"], {"grid": "nvfp4"})):
        coded = rtn(net, pattern=names, bits=3)
        if other:
            coded = rtn(coded, pattern="*.weight", indivisible="pad", **other)
        with torch.no_grad():  # gradients are wanted all the same
            found = end_to_end(coded, [torch.arange(9)[None]], net, teacher=True, steps=3)
        assert net.calls == 0
        learned = [name for name in found if not torch.equal(found[name], coded[name])]
        assert learned == ["words.weight_scale", *([] if other else ["layer.weight_scale"]), "head.weight_scale"]
        assert torch.equal(found["head.weight_scale"], found["words.weight_scale"])
        assert found.ties == coded.ties
    apart = rtn(Weights.of({"words.weight": net.words.weight.detach(), "head.weight": torch.ones(9, 8)}), pattern="*")
    with pytest.raises(Error, match="one tensor in the model"):
        end_to_end(apart, [torch.arange(9)[None]], net, teacher=True)


def test_steps_of_zero_and_steps_that_are_lost():
    net = network()
    with torch.no_grad():
        net[0].weight[3] = 0
    found = end_to_end(rtn(net, grid="sign", pattern="*.weight"), data(net), net, steps=3)
    assert all(found[name].isfinite().all() for name in found)
    coded = rtn(net, bits=3, pattern="*.weight")
    far = end_to_end(coded, data(net), net, steps=20, lr=9.0)
    ratio = far["0.weight_scale"] / coded["0.weight_scale"]
    assert ratio.min() >= 0.25
    assert ratio.max() <= 4
    assert ratio.max() > 2
    with pytest.raises(Error, match="came to be no numbers"):
        end_to_end(coded, [(x * torch.nan, y) for x, y in data(net)], net, steps=1)


def test_a_language_model(shared_llama: Path):
    transformers = pytest.importorskip("transformers", reason="loads Hugging Face models")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared_llama).eval()
    tokens = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    coded = rtn(open(shared_llama), bits=3, group=8)
    for teacher in (False, True):
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
        found = end_to_end(coded, [batch], model, teacher=teacher, steps=3, compute="bfloat16" if teacher else None)
        assert all(found[name].isfinite().all() for name in found if name.endswith("_scale"))
        assert not torch.equal(
            found["model.layers.0.self_attn.q_proj.weight_scale"], coded["model.layers.0.self_attn.q_proj.weight_scale"]
        )


def test_refusals():
    net = network()
    coded = rtn(net, bits=2, pattern="*.weight")
    with pytest.raises(Error, match="at least one batch"):
        end_to_end(coded, [], net)
    with pytest.raises(Error, match="needs a step"):
        end_to_end(coded, data(net), net, steps=0)
    with pytest.raises(Error, match="nothing here is quantized"):
        end_to_end(net, data(net), net)
    with pytest.raises(Error, match=r"the model has no 2\.weight"):
        end_to_end(coded, data(net), net[:1])
    alone = rtn(net, grid=Integer(bits=3, per_tensor=True), pattern="0.weight")
    with pytest.raises(Error, match="no coded tensor has a step"):
        end_to_end(alone, data(net), net)
