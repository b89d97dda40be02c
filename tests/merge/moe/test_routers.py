"""Experts of low rank behind a router: against loops over inputs and experts, and against plain merges."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge.moe import RoutedLinear, fold, routed
from weightsmith.merge.moe._routed_linear import direction, factored


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(seed: int = 0, inner: int = 4, out: int = 3) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inner, out)


def factors(count: int, ranks: tuple[int, ...] = (2, 1, 3)) -> list[tuple[Tensor, Tensor]]:
    return [(random(3, ranks[e % 3], seed=e), random(ranks[e % 3], 4, seed=50 + e)) for e in range(count)]


def part(module: Any, place: int) -> Any:
    """A layer of a sequence."""
    return module[place]


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def share(layer: nn.Linear, bank: list[Any], router: str, x: Tensor, points: Tensor, keep: int, t: float) -> Tensor:
    """The weight of one input, written out."""
    scores = []
    for e, (b, a) in enumerate(bank):
        if router == "arrow":
            first = torch.linalg.svd(b @ a)[2][0]
            scores.append(abs(float(first @ x)))
        else:
            scores.append(-sum(float(x[i] - points[e, i]) ** 2 for i in range(4)))
    best = sorted(range(len(bank)), key=lambda e: -scores[e])[:keep]
    shares = torch.tensor([scores[e] / t for e in best]).softmax(0)
    weight = layer.weight.detach().clone()
    for g, e in zip(shares, best, strict=True):
        weight += g * bank[e][0] @ bank[e][1]
    return weight


@pytest.mark.parametrize("router", ["arrow", "centroid"])
@pytest.mark.parametrize(("keep", "temperature"), [(None, 1.0), (1, 1.0), (2, 0.3)])
def test_every_token_has_a_weight_of_its_own(router: Any, keep: int | None, temperature: float):
    layer, bank, points = linear(), factors(3), random(3, 4, seed=9)
    inputs = random(2, 5, 4, seed=7)
    given = points if router == "centroid" else None
    found = RoutedLinear(layer, bank, router, points=given, keep=keep, temperature=temperature)(inputs)
    for n in range(2):
        for position in range(5):
            x = inputs[n, position]
            weight = share(layer, bank, router, x, points, keep or 3, temperature)
            torch.testing.assert_close(found[n, position], weight @ x + layer.bias, rtol=1e-4, atol=1e-5)


def test_an_example_has_one_choice_for_all_positions():
    layer = RoutedLinear(linear(), factors(3), "arrow", keep=2, level="example")
    inputs = random(2, 5, 4, seed=7)
    weight = layer.weight(inputs)
    assert weight.shape == (2, 1, 3)
    assert ((weight > 0).sum(-1) == 2).all()
    scores = layer.scores(inputs).mean(1)
    assert torch.equal(weight[:, 0].argmax(-1), scores.argmax(-1))
    found = layer(inputs)
    for n in range(2):
        plain = layer.fold(weight[n, 0])
        torch.testing.assert_close(found[n], plain(inputs[n]), rtol=1e-4, atol=1e-5)
    flat = RoutedLinear(linear(), factors(3), "arrow", keep=2)
    assert torch.equal(layer(inputs[:, 0]), flat(inputs[:, 0]))  # one position: both levels are one


@pytest.mark.parametrize("router", ["arrow", "centroid", "gate", "mean"])
def test_the_order_of_experts_does_not_matter(router: Any):
    bank, points, order = factors(3), random(3, 4, seed=9), [2, 0, 1]
    centroid = router == "centroid"
    one = RoutedLinear(linear(), bank, router, points=points if centroid else None, keep=2)
    two = RoutedLinear(linear(), [bank[e] for e in order], router, points=points[order] if centroid else None, keep=2)
    if router == "gate":
        one.slope.data, one.offset.data = points, points[:, 0]
        two.slope.data, two.offset.data = points[order], points[order, 0]
    inputs = random(6, 4, seed=3)
    torch.testing.assert_close(one(inputs), two(inputs))
    torch.testing.assert_close(one.weight(inputs)[:, order], two.weight(inputs))


@pytest.mark.parametrize("router", ["arrow", "centroid", "gate", "mean"])
def test_one_expert_is_a_plain_adapter(router: Any):
    layer, bank = linear(), factors(1)
    found = RoutedLinear(layer, bank, router, points=random(1, 4) if router == "centroid" else None)
    inputs = random(6, 4, seed=3)
    wanted = inputs @ (layer.weight + bank[0][0] @ bank[0][1]).T + layer.bias
    torch.testing.assert_close(found(inputs), wanted)
    torch.testing.assert_close(found.fold([1.0])(inputs), wanted)


def test_constant_routers_fold():
    bank, inputs = factors(3), random(6, 4, seed=3)
    mean = RoutedLinear(linear(), bank, "mean", weight=[0.5, -1.0, 2.0])
    for layer in (mean, RoutedLinear(linear(), bank, "gate", keep=2)):
        if layer.router == "gate":
            layer.offset.data = torch.tensor([0.5, -1.0, 2.0])
        plain = layer.fold()
        assert type(plain) is nn.Linear
        torch.testing.assert_close(plain(inputs), layer(inputs))
    with pytest.raises(Error, match="needs an input to choose by"):
        RoutedLinear(linear(), bank, "arrow").fold()
    with pytest.raises(Error, match="needs 3 coefficients"):
        RoutedLinear(linear(), bank, "arrow").fold([1.0])


def test_dtypes_stay():
    layer = RoutedLinear(linear().bfloat16(), factors(2), "arrow")
    assert layer.up.dtype == torch.float32
    assert layer(random(3, 4).bfloat16()).dtype == torch.bfloat16
    assert layer.fold([1.0, 0.0]).weight.dtype == torch.bfloat16


def test_the_first_direction():
    b, a = random(5, 3, seed=1), random(3, 7, seed=2)
    wanted = torch.linalg.svd(b @ a)[2][0]
    torch.testing.assert_close((direction(b, a) @ wanted).abs(), torch.tensor(1.0))
    assert not direction(torch.zeros(5, 2), torch.zeros(2, 7)).any()


def test_factors_of_a_matrix():
    change = random(5, 2, seed=1) @ random(2, 7, seed=2)
    b, a = factored(change)
    assert b.shape == (5, 2)
    torch.testing.assert_close(b @ a, change)
    u, s, v = torch.linalg.svd(random(4, 6))
    b, a = factored(random(4, 6), rank=2)
    torch.testing.assert_close(b @ a, (u[:, :2] * s[:2]) @ v[:2])
    assert factored(torch.zeros(3, 4))[0].shape == (3, 1)


# Whole modules


@pytest.mark.parametrize("weight", [None, [0.2, 0.5, -0.4]])
def test_the_static_limit_is_the_weighted_merge(weight: list[float] | None):
    base, models = network(0), [network(seed) for seed in (1, 2, 3)]
    found = routed(network(9), base, models, "*", "mean", weight=weight)
    plain = network(8)
    ws.merge.task_arithmetic(models, base=base, weight=weight or [1 / 3] * 3).load_into(plain)
    inputs = random(7, 4)
    torch.testing.assert_close(found(inputs), plain(inputs), rtol=1e-4, atol=1e-5)
    folded = fold(found)
    assert [type(layer) for layer in folded.children()] == [nn.Linear, nn.Tanh, nn.LayerNorm, nn.Linear]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_named_are_merged():
    base, models = network(0), [network(seed) for seed in (1, 2)]
    found = routed(network(9), base, models, "0", "arrow")
    assert isinstance(part(found, 0), RoutedLinear)
    assert type(part(found, 3)) is nn.Linear
    torch.testing.assert_close(part(found, 3).weight, (part(models[0], 3).weight + part(models[1], 3).weight) / 2)
    layer = part(found, 0).layer
    torch.testing.assert_close(layer.bias, (part(models[0], 0).bias + part(models[1], 0).bias) / 2)
    assert torch.equal(layer.weight, part(base, 0).weight)


def test_one_fine_tune_by_any_router_is_itself():
    base, model, inputs = network(0), network(1), random(7, 4)
    data = [[(inputs, torch.zeros(7, dtype=torch.int64))]]
    for router in ("arrow", "centroid", "gate", "mean"):
        found = routed(network(9), base, [model], "*", router, data=data, steps=2)
        torch.testing.assert_close(found(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_inputs_stay_as_they_were():
    base, models, module = network(0), [network(1), network(2)], network(9)
    before = copy.deepcopy([base.state_dict(), models[0].state_dict(), module.state_dict()])
    routed(module, base, models, "*", "arrow")
    for state, was in zip((base, models[0], module), before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in state.state_dict().items())


def test_centroids_are_mean_inputs_of_the_base():
    base, bank = network(0), [{"3": (random(3, 1, seed=e), random(1, 6, seed=e))} for e in range(2)]
    data = [[random(5, 4, seed=3), random(2, 4, seed=4)], [random(6, 4, seed=5) + 3]]
    found = routed(network(9), base, bank, "3", "centroid", data=data, keep=1)
    for number, batches in enumerate(data):
        inner = base[:3](torch.cat(batches))
        wanted = inner.mean(0).detach()
        torch.testing.assert_close(part(found, 3).get_buffer("points")[number], wanted, rtol=1e-4, atol=1e-5)


def test_a_gate_learns_whose_input_it_is():
    """Two regressions with opposite answers, told apart by the first feature."""
    base = nn.Sequential(linear(0, 4, 2))
    torch.nn.init.zeros_(part(base, 0).weight)
    torch.nn.init.zeros_(part(base, 0).bias)
    bank = [{"0": (torch.tensor([[s * 4.0], [-s * 4.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))} for s in (1, -1)]
    data = []
    for task, sign in enumerate((1.0, -1.0)):
        inputs = random(64, 4, seed=task)
        inputs[:, 0] = 2 * sign
        data.append([(inputs, ((inputs[:, 1] * sign) < 0).long())])
    told: list[int] = []
    options: dict[str, Any] = {"data": data, "steps": 100, "rate": 0.05, "on_step": lambda s: told.append(s.number)}
    found = routed(base, None, bank, "0", "gate", **options)
    again = routed(base, None, bank, "0", "gate", **options)
    assert told == [*range(1, 101)] * 2
    for batches, (inputs, labels) in zip(data, (part[0] for part in data), strict=True):
        assert batches
        assert float((found(inputs).argmax(1) == labels).float().mean()) > 0.9
        assert torch.equal(found(inputs), again(inputs))
    assert all(not parameter.requires_grad for name, parameter in found.named_parameters() if "layer" in name)


def test_adapters_by_their_tensors():
    base = network(0)
    adapters = []
    for seed in (1, 2):
        tensors = {
            "base_model.model.0.lora_A.weight": random(2, 4, seed=seed),
            "base_model.model.0.lora_B.weight": random(6, 2, seed=seed + 5),
        }
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["0"]}
        adapters.append(ws.Weights.of(tensors).with_files({"adapter_config.json": json.dumps(config).encode()}))
    found = routed(network(9), base, adapters, "*", "mean", weight=[0.5, 2.0])
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for seed, amount in ((1, 0.5), (2, 2.0)):
            part(plain, 0).weight += amount * 3 * random(6, 2, seed=seed + 5) @ random(2, 4, seed=seed)
    inputs = random(7, 4)
    torch.testing.assert_close(found(inputs), plain(inputs), rtol=1e-4, atol=1e-5)
    assert torch.equal(part(found, 3)(random(2, 6)), part(base, 3)(random(2, 6)))  # of which they say nothing


def test_the_same_as_arrow_in_peft():
    """Prototypes and shares of `peft.tuners.lora.arrow`, from its factors."""
    reason = 'needs peft: pip install "weightsmith[peers]"'
    arrow = pytest.importorskip("peft.tuners.lora.arrow", reason=reason, exc_type=ImportError)
    peft = pytest.importorskip("peft", reason=reason, exc_type=ImportError)
    bank = factors(3, ranks=(2, 2, 2))
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = [f"task_{e}" for e in range(3)], []
    theirs = arrow.ArrowLoraLinearLayer(4, config)
    lora_a, lora_b = nn.ModuleDict(), nn.ModuleDict()
    for e, (b, a) in enumerate(bank):
        lora_a[f"task_{e}"], lora_b[f"task_{e}"] = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        lora_a[f"task_{e}"].weight.data, lora_b[f"task_{e}"].weight.data = a, b
    theirs.build_prototypes(lora_a, lora_b)
    inputs = random(5, 4, seed=3)
    ones = dict.fromkeys(lora_a, 1.0)
    wanted = theirs(inputs, lora_A=lora_a, lora_B=lora_b, dropout=nn.Identity(), scaling=ones)
    layer = linear()
    found = RoutedLinear(layer, bank, "arrow", keep=2, temperature=0.7)(inputs) - layer(inputs)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-2, atol=1e-2)  # by power iteration


PLAIN = {"0": (torch.ones(6, 1), torch.ones(1, 4))}


@pytest.mark.parametrize(
    ("said", "experts", "options"),
    [
        ("takes a list", PLAIN, {}),
        ("takes a list", [], {}),
        ("router is one of arrow", [PLAIN], {"router": "arow"}),
        ("level is one of", [PLAIN], {"level": "layer"}),
        ("keep must be from 1 to 1", [PLAIN], {"keep": 2}),
        ("temperature > 0", [PLAIN], {"temperature": 0.0}),
        ("1 weights", [PLAIN], {"weight": [1.0, 2.0]}),
        ("needs data=", [PLAIN], {"router": "centroid"}),
        ("needs data=", [PLAIN], {"router": "gate"}),
        ("no linear module fits", [PLAIN], {"layers": "2"}),
        ("do not fit 0, which is", [{"0": (torch.ones(5, 1), torch.ones(1, 4))}], {}),
        ("changes none of the layers; it changes 7", [{"7": PLAIN["0"]}], {}),
        ("some are of one kind", [PLAIN, network(1)], {}),
        ("must have the same tensors", [nn.Linear(4, 6)], {}),
        ("loss is", [PLAIN], {"loss": "agreement"}),
    ],
)
def test_refusals(said: str, experts: Any, options: dict[str, Any]):
    with pytest.raises(Error, match=said):
        routed(network(9), network(0), experts, options.pop("layers", "0"), options.pop("router", "arrow"), **options)
