"""The search of factors by output error, against a loop; and what a user calls, on whole networks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.quantize.transforms._networks import answers, network, state, traced
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.graph import declare, trace
from weightsmith.quantize import coded, fitted, output_error
from weightsmith.quantize.grids import Integer
from weightsmith.quantize.room import planned
from weightsmith.quantize.transforms import awq, places
from weightsmith.quantize.transforms._awq import ROWS, _descended, factors_for, searched
from weightsmith.quantize.transforms._parts import Reading

OPTIONS: dict[str, Any] = {"bits": 3, "group": 4, "symmetric": False}


def outliers():
    """Two layers of which the second is given a few large inputs, and its Gram matrix."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        net[0].weight[3] *= 30
        net[0].weight[9] *= 10
    data = [torch.randn(64, 8) for _ in range(2)]
    return net, data


def by_hand(weight, inputs, exponents, grid, clip=0):
    """Every exponent's factors and error, from the inputs themselves."""
    sizes = inputs.abs().mean(0)
    sizes = sizes.clamp(min=1e-4 * sizes.max())
    for exponent in exponents:
        factor = sizes**exponent
        factor = factor / (factor.max() * factor.min()).sqrt()
        inside = weight * factor
        gram = (inputs / factor).T @ (inputs / factor)
        back = coded(inside, grid, fitted(inside, grid, gram, clip=clip)).values() / factor
        yield float((inputs @ (back - weight).T).square().sum()), factor


@pytest.mark.parametrize("clip", [0, 4])
def test_the_exponent_is_the_best_of_a_loop_over_the_inputs_themselves(clip: int) -> None:
    net, data = outliers()
    options = OPTIONS | ({"clip": clip} if clip else {})
    new = awq(net, data, steps=10, **options)
    inputs = net[1](net[0](torch.cat(data))).detach()
    grid = Integer(bits=3, group=4, symmetric=False)
    found = list(by_hand(net[2].weight.detach(), inputs, [i / 10 for i in range(11)], grid, clip))
    least, factor = min(found, key=lambda pair: pair[0])
    assert least < 0.9 * found[0][0]  # or there was nothing to find
    assert torch.allclose(new["2.weight"], net[2].weight * factor, rtol=1e-4)
    assert torch.allclose(new["0.weight"], net[0].weight / factor[:, None], rtol=1e-4)
    assert torch.allclose(new["0.bias"], net[0].bias / factor, rtol=1e-4)


def test_all_that_read_a_place_count_together() -> None:
    torch.manual_seed(1)
    weights = {"gain": torch.ones(8), "q": torch.randn(4, 8), "k": torch.randn(6, 8)}
    rules = {"gain": "s", "q": "4, < s", "k": "6, < s"}
    graph = declare(weights, rules, spaces={"s": {"flags": ["rms_norm"]}})
    inputs = torch.randn(50, 8) * torch.tensor([1.0, 1, 1, 20, 1, 1, 5, 1])
    gram = inputs.T @ inputs
    sizes = inputs.abs().mean(0)
    grid = Integer(bits=3, group=4, symmetric=False)
    both = torch.cat([weights["q"], weights["k"]])
    _, factor = min(by_hand(both, inputs, [i / 20 for i in range(21)], grid), key=lambda pair: pair[0])
    new = awq(
        weights, graph=graph, gains={"gain": ["q", "k"]}, stats={"q": gram, "k": gram}, sizes={"q": sizes, "k": sizes},
        pattern=["q", "k"], **OPTIONS,
    )  # fmt: skip
    assert torch.allclose(new["gain"], 1 / factor, rtol=1e-4)
    assert torch.allclose(new["k"], weights["k"] * factor, rtol=1e-4)


def test_sizes_from_a_gram_matrix_alone_in_any_form() -> None:
    net, data = outliers()
    graph = trace(net, data[0], verify=False)
    full = ws.stats.gram(net, data)
    roots = {name: gram.diagonal().sqrt() for name, gram in full.items()}
    told = awq(net, graph=graph, stats=full, sizes=roots, **OPTIONS)
    assert torch.equal(awq(net, graph=graph, stats=full, **OPTIONS)["2.weight"], told["2.weight"])
    for form in ("diagonal", 4):
        grams = ws.stats.gram(net, data, form=form, pattern="2.weight")
        new = awq(net, graph=graph, stats=grams, **OPTIONS)
        assert not torch.equal(new["2.weight"], net[2].weight)
        assert torch.allclose(new["2.weight"][:, 3] / net[2].weight[:, 3], net[0].bias[3] / new["0.bias"][3], rtol=1e-4)


def test_no_layer_loses_on_the_data_it_was_found_with() -> None:
    model, inputs = network("llama")
    new = awq(model, [inputs], steps=8, graph=traced("llama"), **OPTIONS)
    again = copy.deepcopy(model)
    new.load_into(again)
    grams, after = (ws.stats.gram(net, [inputs]) for net in (model, again))
    won, grid = 0, Integer(bits=3, group=4, symmetric=False)
    for place in places(model, traced("llama")):
        errors = []
        for weights, gram in ((model.state_dict(), grams), (again.state_dict(), after)):
            total = 0.0
            for side in place.readers:
                weight = weights[side.tensor]
                total += float(output_error(weight, coded(weight, grid).values(), gram[side.tensor]))
            errors.append(total)
        assert errors[1] <= errors[0] * 1.001, str(place)
        won += errors[1] < 0.95 * errors[0]
    assert won >= 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "vit", "mlp"])
def test_the_function_stays(name: str) -> None:
    model, inputs = network(name)
    before, held = answers(model, inputs), state(model)
    model.train()
    graph = None if name in ("mlp", "llama") else traced(name)
    new = awq(model, iter([inputs, inputs]), steps=3, graph=graph, bits=3, group=None)
    assert model.training
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())
    again = copy.deepcopy(model).eval()
    new.load_into(again)
    assert torch.allclose(answers(again, inputs), before, atol=3e-5)
    assert any(not torch.equal(new[key], held[key]) for key in held)


def test_a_folder_then_any_rounding(llama, tmp_path) -> None:
    words = [{"input_ids": torch.randint(0, 13, (2, 16), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    new = awq(llama, words, steps=4, bits=3, group=8)
    assert {name: spec.shape for name, spec in new.specs.items()} == {
        n: s.shape for n, s in ws.open(llama).specs.items()
    }
    rounded = ws.quantize.sequential(new, words, "gptq", bits=3, group=8)
    assert any(name.endswith("_packed") for name in rounded)
    new.save(tmp_path / "out")
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        both = [
            transformers.AutoModelForCausalLM.from_pretrained(folder)(**words[0]).logits
            for folder in (llama, tmp_path / "out")
        ]
    assert torch.allclose(*both, atol=1e-4)


def test_a_graph_that_is_wrong_is_an_error() -> None:
    """Heads of queries called values: the block computes something else, and is not handed on."""
    model, inputs = network("llama")
    graph = traced("llama")
    wrong = {f"model.layers.{i}.self_attn.{n}_proj.weight": graph.tensors[f"model.layers.{i}.self_attn.{o}_proj.weight"]
             for i in range(2) for n, o in (("k", "v"), ("v", "k"))}  # fmt: skip
    broken = replace(graph, tensors={**graph.tensors, **wrong})
    with pytest.raises(Error, match="computes something else"):
        awq(model, [inputs], graph=broken, steps=2, bits=2, group=4)
    with pytest.raises(Error, match="offset=1"):
        awq(model, [inputs], graph=graph, offset=1.0, steps=2, bits=2, group=4)


def test_dead_inputs_and_data_that_are_all_zero() -> None:
    net, _ = outliers()
    with torch.no_grad():
        net[0].weight[5], net[0].bias[5] = 0, -1  # never fires
    new = awq(net, [torch.randn(32, 8)], **OPTIONS).to_dict()
    assert all(value.isfinite().all() for value in new.values())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1)
    same = awq(net, [torch.randn(32, 8)], **OPTIONS)
    assert all(torch.equal(same[name], value) for name, value in net.state_dict().items())


def test_factors() -> None:
    sizes = torch.tensor([4.0, 0.0, 1.0])
    found = factors_for(sizes, 1.0)
    assert torch.allclose(found, torch.tensor([4.0, 4e-4, 1.0]) / (4 * 4e-4) ** 0.5)
    assert torch.equal(factors_for(sizes, 0.0), torch.ones(3))
    assert factors_for(torch.zeros(2), 0.7).tolist() == [1.0, 1.0]


def reading(rows, gram, **options: Any) -> Reading:
    plan = planned(ws.quantize.rtn.kernel, ws.open({"w": rows}), {**OPTIONS, "pattern": "w", **options})["w"]  # type: ignore[attr-defined]
    return Reading(rows, torch.arange(rows.shape[1]), gram, plan)


def test_of_large_matrices_a_share_of_the_rows_leads_to_what_all_of_them_say() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(99, 16, generator=generator) * torch.logspace(0, 2, 16)
    large, small = (torch.randn(rows, 16, generator=generator) for rows in (5 * ROWS, ROWS // 2))
    counted = [reading(rows, inputs.T @ inputs) for rows in (large, small)]
    sizes = inputs.abs().mean(0)
    errors = [float(sum(one.error(factors_for(sizes, step / 20)) for one in counted)) for step in range(21)]
    best = min(range(21), key=errors.__getitem__)
    assert 0 < best < 20
    exponent, factor = searched(sizes, counted)
    assert exponent == best / 20
    assert torch.equal(factor, factors_for(sizes, exponent))


def test_downhill() -> None:
    def found(errors: list[float], start: int) -> int:
        return _descended(start, errors.__getitem__, len(errors) - 1)

    assert found([9, 8, 7, 3, 5, 1], 1) == 3
    assert found([9, 8, 7, 3, 5, 1], 5) == 5
    assert found([2, 8, 7, 3, 5, 4], 2) == 0
    assert found([2, 8, 2, 3], 2) == 0
    assert found([1], 0) == 0


@pytest.mark.parametrize("clip", [0, 3])
def test_rows_of_a_share_stand_for_the_others(clip: int) -> None:
    generator = torch.Generator().manual_seed(0)
    row, gram = torch.randn(1, 8, generator=generator), torch.rand(8, generator=generator)
    whole = reading(row.repeat(100, 1), gram, **({"clip": clip} if clip else {}))
    factor = torch.rand(8, generator=generator) + 0.5
    grid = Integer(bits=3, group=4, symmetric=False)
    told = torch.diag(gram / factor.square())
    back = coded(row * factor, grid, fitted(row * factor, grid, told, clip=clip)).values() / factor
    assert float(whole.error(factor)) == pytest.approx(100 * float(((back - row).square() * gram).sum()), rel=1e-4)
    assert float(whole.share(8).error(factor)) == pytest.approx(float(whole.error(factor)), rel=1e-4)
    assert len(whole.share(8).rows) == 8
    assert whole.share(100) is whole
    drawn = reading(torch.arange(100.0)[:, None].expand(100, 8), gram).share(50).rows[:, 0].tolist()
    assert len(set(drawn)) == 50
    assert sum(drawn) / 50 == pytest.approx(49.5, abs=10)


def test_what_is_not_finite_is_named() -> None:
    net, data = outliers()
    graph, gram = trace(net, data[0], verify=False), torch.eye(16)
    for grams, sizes in (({"2.weight": gram * torch.nan}, None), ({"2.weight": gram}, {"2.weight": gram[0] / 0})):
        with pytest.raises(Error, match=r"2\.weight.* finite"):
            awq(net, graph=graph, stats=grams, sizes=sizes, **OPTIONS)


def test_refusals() -> None:
    net, data = outliers()
    for call, said in (
        (lambda: awq(net, data, steps=0), "at least one exponent"),
        (lambda: awq(net), "batches of data, or Gram"),
        (lambda: awq(net, []), "at least one batch"),
        (lambda: awq(net, data, bits=3, group=5), "do not fill"),
        (lambda: awq(net, data, bitz=3), "bitz"),
        (lambda: awq(net, data, pattern="0.weight"), "no tensor that is rounded"),
    ):
        with pytest.raises(Error, match=said):
            call()
