"""Layers merged anew for every example: against loops over examples, and against plain task arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge.moe import Routing, WeightMixture, fold, weight_ensembling


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """A little of a transformer: an MLP on positions between two other layers."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(3, 4)
            self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
            self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        return self.head((hidden + self.mlp(hidden)).mean(dim=1))


def family() -> tuple[Block, list[Block], list[list[Tensor]]]:
    return Block(0), [Block(1), Block(2)], [[random(8, 5, 3, seed=task)] for task in (3, 4)]


def arithmetic(base: nn.Module, models: list[Block], amount: float) -> Block:
    module = Block(9)
    ws.merge.task_arithmetic(models, base=base, weight=amount).load_into(module)
    return module


def mixture_of(found: nn.Module, place: str = "mlp") -> WeightMixture:
    layer = found.get_submodule(place)
    assert isinstance(layer, WeightMixture)
    return layer


# Equal to task arithmetic


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("layers", ["mlp", "mlp.*", ["embed", "head"]])
def test_constant_routers_give_task_arithmetic(depth: int, layers):
    base, models, data = family()
    found = weight_ensembling(models, base, Block(9), layers, amount=0.4, depth=depth)
    for name, parameter in found.named_parameters():
        if "router" in name and not name.endswith("bias"):
            nn.init.zeros_(parameter)  # what is left is the constant
    torch.testing.assert_close(found(data[0][0]), arithmetic(base, models, 0.4)(data[0][0]))


def test_it_begins_near_task_arithmetic():
    base, models, data = family()
    begun = weight_ensembling(models, base, Block(9), "mlp")(data[0][0])
    torch.testing.assert_close(begun, arithmetic(base, models, 0.3)(data[0][0]), atol=0.05, rtol=0)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_fold_leaves_the_plain_module(depth: int):
    base, models, data = family()
    found = weight_ensembling(models, base, Block(9), "mlp", depth=depth)
    plain = fold(found)
    assert [type(part) for part in plain.modules()] == [type(part) for part in base.modules()]
    assert set(plain.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(plain(data[0][0]), arithmetic(base, models, 0.3)(data[0][0]))
    if depth == 0:
        torch.testing.assert_close(plain(data[0][0]), found(data[0][0]))
    assert isinstance(found.get_submodule("mlp"), WeightMixture)  # what was folded is as it was
    first = fold(found, {"mlp": [1.0, 0.0]})
    for name, value in models[0].mlp.state_dict().items():
        torch.testing.assert_close(first.state_dict()[f"mlp.{name}"], value)
    with pytest.raises(Error, match="fold needs 2 coefficients, got \\[3\\]"):
        fold(found, [1.0, 0.0, 0.0])


# One example at a time


@pytest.mark.parametrize("at_once", [1, 3, 32])
@pytest.mark.parametrize("depth", [1, 2])
def test_each_example_has_weights_of_its_own(at_once: int, depth: int):
    base, models, _ = family()
    found = weight_ensembling(models, base, Block(9), "mlp", depth=depth, at_once=at_once)
    mixture = mixture_of(found)
    for parameter in mixture.router.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    hidden = random(7, 5, 4, seed=6)
    rows = []
    for example in hidden:
        router, answers = mixture.router, []
        for position in example:
            inner = position
            if depth == 2:
                inner = (router.hidden[0] @ position + router.hidden[1]).clamp(min=0)
            answers.append(router.weight @ inner + router.bias)
        weight = sum(answers) / len(answers)
        plain = copy.deepcopy(base.mlp)
        with torch.no_grad():
            for name, value in plain.named_parameters():
                for share, model in zip(weight, models, strict=True):
                    value += share * (model.mlp.get_parameter(name) - base.mlp.get_parameter(name))
        rows.append(plain(example))
    torch.testing.assert_close(mixture(hidden), torch.stack(rows), rtol=1e-4, atol=1e-4)


def test_examples_do_not_touch_each_other():
    base, models, data = family()
    found = weight_ensembling(models, base, Block(9), "mlp", depth=1)
    nn.init.normal_(mixture_of(found).router.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    inputs = data[0][0]
    together = found(inputs)
    for number in range(len(inputs)):
        torch.testing.assert_close(found(inputs[number : number + 1])[0], together[number])
    assert mixture_of(found).weight(found.get_submodule("embed")(inputs)).std(dim=0).min() > 0.01


def test_inputs_without_positions():
    layer = nn.Linear(4, 2)
    mixture = WeightMixture(layer, {"weight": random(3, 2, 4)}, features=4, generator=torch.Generator().manual_seed(0))
    inputs = random(6, 4)
    weight = inputs @ mixture.router.weight.T + mixture.router.bias  # type: ignore[union-attr]
    expected = [
        functional.linear(x, layer.weight + torch.einsum("k,koi->oi", a, mixture.get_buffer("direction_0")), layer.bias)
        for x, a in zip(inputs, weight, strict=True)
    ]
    torch.testing.assert_close(mixture(inputs), torch.stack(expected))


# What it holds


def test_it_holds_the_start_and_a_direction_for_each_model():
    base, models, _ = family()
    found = weight_ensembling(models, base, Block(9), "mlp", depth=1)
    inner = sum(p.numel() for p in base.mlp.parameters())
    state = found.state_dict()
    router = 4 * 2 + 2
    assert (
        sum(value.numel() for value in state.values()) == sum(p.numel() for p in base.parameters()) + 2 * inner + router
    )
    trained = {name for name, p in found.named_parameters() if p.requires_grad}
    assert trained == {"mlp.router.weight", "mlp.router.bias"}
    again = weight_ensembling(models, base, Block(9), "mlp", depth=1, seed=5)
    assert not torch.equal(again.state_dict()["mlp.router.weight"], state["mlp.router.weight"])
    again.load_state_dict(state)
    assert torch.equal(again(random(2, 5, 3)), found(random(2, 5, 3)))


def test_inputs_and_the_global_generator_are_left_alone():
    base, models, data = family()
    module = Block(9)
    before = [copy.deepcopy(one.state_dict()) for one in (base, *models, module)]
    state = torch.random.get_rng_state()
    one, two, other = (
        weight_ensembling(models, base, module, "mlp", data, steps=3, rate=0.01, seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    for kept, now in zip(before, (base, *models, module), strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in now.state_dict().items())
    assert module.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_modules_on_the_meta_device_and_low_precision(tmp_path):
    base, models, data = family()
    for name, model in {"base": base, "a": models[0], "b": models[1]}.items():
        ws.open(model).cast("bfloat16").save(tmp_path / f"{name}.safetensors")
    with torch.device("meta"):
        module = Block(9)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    found = weight_ensembling(paths, tmp_path / "base.safetensors", module, "mlp", depth=1)
    assert found(data[0][0].bfloat16()).dtype == torch.bfloat16
    assert mixture_of(found).get_buffer("direction_0").dtype == torch.float32
    expected = weight_ensembling(models, base, Block(9), "mlp", depth=1)(data[0][0])
    torch.testing.assert_close(found(data[0][0].bfloat16()).float(), expected, atol=0.05, rtol=0.05)


def test_tied_weights_in_a_layer_are_mixed_once():
    class Pair(nn.Module):
        def __init__(self, size: float):
            super().__init__()
            self.inner = nn.Module()
            self.inner.register_parameter("a", nn.Parameter(torch.full((2, 2), size)))
            self.inner.register_parameter("b", self.inner.a)
            self.inner.forward = lambda x, own=self.inner: x @ own.a @ own.b

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs)

    found = weight_ensembling([Pair(1.0)], Pair(0.0), Pair(0.5), "inner", depth=0, amount=0.5)
    assert mixture_of(found, "inner").names == ["a"]


# Routers are trained


def test_routers_tell_the_tasks_apart():
    """Two tasks with opposed answers on different inputs: no one set of coefficients serves both."""
    base = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(base[0].weight), nn.init.zeros_(base[0].bias)
    models = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        models[0][0].bias += torch.tensor([4.0, -4.0])
        models[1][0].bias += torch.tensor([-4.0, 4.0])
    inputs = [torch.tensor([3.0, 0.0]).expand(16, 2), torch.tensor([0.0, 3.0]).expand(16, 2)]
    data = [[(x, torch.full((16,), task))] for task, x in enumerate(inputs)]
    told: list[Routing] = []
    found = weight_ensembling(
        models, base, base, "0", data, loss="labels", depth=1, steps=200, rate=0.02, on_step=told.append
    )
    assert [found(x).argmax(1).unique().tolist() for x in inputs] == [[0], [1]]
    assert [one.number for one in told] == list(range(1, 201))
    assert sum(told[-1].losses) < 0.3 * sum(told[0].losses)
    constant = weight_ensembling(models, base, base, "0", data, loss="labels", depth=0, steps=200, rate=0.02)
    assert constant(torch.zeros(1, 2)).abs().max() < 0.5  # it can serve neither


def test_entropy_falls():
    base, models, data = family()
    told: list[Routing] = []
    weight_ensembling(models, base, Block(9), "mlp", data, steps=30, rate=0.01, on_step=told.append)
    assert sum(told[-1].losses) < sum(told[0].losses)


def test_refusals():
    base, models, data = family()
    for text, options in {
        "no module with weights fits layers='mpl' \\(did you mean 'mlp'": {"layers": "mpl"},
        "no module with weights fits layers='mlp.1'": {"layers": "mlp.1"},
        "data needs batches for each of the 2 models, got 1": {"layers": "mlp", "data": data[:1]},
        "loss is a function or one of entropy, labels; got 'agreement'": {"layers": "mlp", "loss": "agreement"},
        "needs depth >= 0": {"layers": "mlp", "depth": -1},
        "not finite": {"layers": "mlp", "data": [[torch.full((2, 5, 3), torch.nan)]] * 2, "steps": 1},
    }.items():
        with pytest.raises(Error, match=text):
            weight_ensembling(models, base, Block(9), **options)
    with pytest.raises(Error, match="needs at least 1 model, got 0"):
        weight_ensembling([], base, Block(9), "mlp")
    norms = [nn.Sequential(nn.LayerNorm(3)) for _ in range(2)]
    with pytest.raises(Error, match="has no matrix that tells the width"):
        weight_ensembling(norms[:1], norms[1], norms[1], "0")
