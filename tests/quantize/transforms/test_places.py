"""Where networks can be rescaled, of whatever architecture, and that they stay what they are."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.quantize.transforms._networks import NAMES, answers, network, traced
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.graph import declare, of, trace
from weightsmith.quantize.transforms import places, scaled
from weightsmith.quantize.transforms._places import Side, by_position, by_unit


def random_factors(found):
    generator = torch.Generator().manual_seed(3)
    return {place.name: torch.randn(place.units, generator=generator).exp() for place in found}


@pytest.mark.parametrize("name", NAMES)
def test_any_factors_at_all_places_keep_the_function(name: str) -> None:
    model, inputs = network(name)
    before = answers(model, inputs)
    found = places(model, traced(name))
    new = scaled(model, found, random_factors(found))
    again = copy.deepcopy(model)
    new.load_into(again)
    assert torch.allclose(answers(again, inputs), before, atol=3e-5)
    touched = {side.tensor for place in found for side in (*place.writers, *place.readers)}
    assert all((name in touched) == (not torch.equal(new[name], model.state_dict()[name])) for name in new)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", {"q_proj", "o_proj", "gate_proj", "down_proj"}),
        ("qwen3", {"q_proj", "o_proj", "gate_proj", "down_proj"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj"}),  # which half of gate_up is bent its graph does not tell
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("vit", {"q_proj", "o_proj", "fc1"}),
    ],
)
def test_the_places_of_every_block(name: str, wanted: set[str]) -> None:
    found = places(network(name)[0], traced(name))
    block = [place for place in found if ".1." in place.readers[0].tensor]
    assert {place.readers[0].tensor.split(".")[-2] for place in block} == wanted
    assert len(block) == len(wanted)


def test_a_folder_and_its_module_have_the_same_places(tmp_path) -> None:
    model, _ = network("llama")
    model.save_pretrained(tmp_path)
    told = places(ws.open(tmp_path), of(ws.open(tmp_path)))
    seen = places(model, traced("llama"))

    def said(found):
        return {tuple(frozenset(s.tensor for s in side) for side in (p.writers, p.readers)): p.units for p in found}

    assert said(told) == said(seen)
    assert len(told) == 8
    assert "v_proj.weight -> model.layers.0.self_attn.o_proj.weight" in "".join(map(str, told))


def test_grouped_heads_share_the_factors_of_their_values() -> None:
    found = places(network("llama")[0], traced("llama"))
    place = next(place for place in found if "o_proj" in place.readers[0].tensor)
    # 2 groups of values, 4 wide; 6 query heads: the first three read the first group.
    assert place.units == 8
    assert place.writers[0].units.tolist() == list(range(8))
    assert place.readers[0].units.tolist() == [*list(range(4)) * 3, *list(range(4, 8)) * 3]


def test_tied_embeddings_are_no_readers_and_queries_no_writers() -> None:
    found = places(network("llama")[0], traced("llama"))
    touched = {s.tensor for p in found for s in (*p.writers, *p.readers)}
    assert not {name for name in touched if "embed" in name or "lm_head" in name or name == "model.norm.weight"}
    writers = {s.tensor for p in found for s in p.writers}
    assert not {name for name in writers if "q_proj" in name or "gate_proj" in name}


def test_gelu_and_batch_norm_let_nothing_through_relu_and_nothing_do() -> None:
    bent = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    assert places(bent, trace(bent.eval(), torch.zeros(4, 2), verify=False)) == ()
    found = places(network("mlp")[0], traced("mlp"))
    assert [(place.writers[0].tensor, place.readers[0].tensor) for place in found] == [
        ("0.weight", "2.weight"), ("4.weight", "5.weight")]  # fmt: skip


def test_convolutions_have_places_by_channel() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    inputs = torch.randn(2, 2, 8, 8)
    (place,) = places(model, trace(model, inputs, verify=False))
    again = copy.deepcopy(model)
    scaled(model, [place], {place.name: torch.tensor([0.5, 1.0, 2.0, 7.0])}).load_into(again)
    assert torch.allclose(again(inputs), model(inputs), atol=1e-5)


def test_norms_that_names_do_not_tell_of_are_named_or_left_with_a_warning() -> None:
    weights = {"gain": torch.tensor([1.0, 2.0]), "bias": torch.ones(2), "up": torch.ones(3, 2)}
    graph = declare(
        weights, {"gain": "s", "bias": "> s", "up": "3, < s"}, spaces={"s": {"flags": ["layer_norm"], "kind": "stream"}}
    )
    with pytest.warns(UserWarning, match="norms are left"):
        assert places(weights, graph) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (place,) = places(weights, graph, {"gain": ["up"]})
    new = scaled(weights, [place], {"gain": torch.tensor([2.0, 4.0])}).to_dict()
    assert new["gain"].tolist() == [0.5, 0.5]
    assert new["bias"].tolist() == [0.5, 0.25]
    assert new["up"].tolist() == [[2.0, 4.0]] * 3
    with pytest.raises(Error, match="no tensor 'down'"):
        places(weights, graph, {"gain": ["down"]})


def test_the_bias_of_a_norm_goes_with_its_gain() -> None:
    place = next(p for p in places(network("gpt2")[0], traced("gpt2")) if "ln_1" in p.name)
    assert {side.tensor.rpartition(".")[2] for side in place.writers} == {"weight", "bias"}


@pytest.mark.parametrize(
    ("gain", "bias"), [("n.weight", "n.bias"), ("n.gamma", "n.beta"), ("norm_weight", "norm_bias")]
)
def test_a_bias_by_any_name(gain: str, bias: str) -> None:
    weights = {gain: torch.tensor([1.0, 2.0]), bias: torch.tensor([3.0, 5.0]), "up": torch.ones(1, 2)}
    graph = declare(weights, {gain: "s", bias: "> s", "up": "1, < s"}, spaces={"s": {"flags": ["layer_norm"]}})
    new = scaled(weights, places(weights, graph, {gain: ["up"]}), {gain: torch.tensor([2.0, 4.0])}).to_dict()
    assert new[bias].tolist() == [1.5, 1.25]
    assert new[gain].tolist() == [0.5, 0.5]


def test_gains_stored_less_one() -> None:
    weights = {"norm": torch.tensor([0.0, 1.0]), "up": torch.ones(1, 2)}
    graph = declare(weights, {"norm": "s", "up": "1, < s"}, spaces={"s": {"flags": ["rms_norm"]}})
    found = places(weights, graph, {"norm": ["up"]}, offset=1.0)
    new = scaled(weights, found, {"norm": torch.tensor([2.0, 4.0])}).to_dict()
    assert new["norm"].tolist() == [-0.5, -0.5]
    assert new["up"].tolist() == [[2.0, 4.0]]


def test_bf16_is_rounded_once_and_powers_of_two_round_nothing() -> None:
    weights = {"up": torch.randn(4, 3).bfloat16(), "down": torch.randn(2, 4).bfloat16()}
    found = places(weights, declare(weights, {"up": "> h, 3", "down": "2, < h"}))
    new = scaled(weights, found, {"h": torch.tensor([0.5, 1.0, 2.0, 8.0])}).to_dict()
    assert new["up"].dtype == torch.bfloat16
    assert torch.equal(new["down"].float() @ new["up"].float(), weights["down"].float() @ weights["up"].float())
    odd = scaled(weights, found, {"h": torch.full((4,), 1.1)})
    assert torch.equal(odd.to_dict()["down"], (weights["down"].float() * 1.1).bfloat16())


def test_saved_in_small_pieces(tmp_path, small_pieces: None) -> None:
    weights = {"norm": torch.rand(9) + 1, "up": torch.randn(30, 9), "down": torch.randn(9, 30)}
    rules = {"norm": "s", "up": "> h, < s", "down": "> s, < h"}
    found = places(weights, declare(weights, rules, spaces={"s": {"flags": ["rms_norm"]}}), {"norm": ["up"]})
    new = scaled(weights, found, random_factors(found))
    whole = new.to_dict()
    new.save(tmp_path / "out.safetensors")
    assert all(torch.equal(ws.open(tmp_path / "out.safetensors")[name], whole[name]) for name in whole)
    by_hand = weights["up"] * random_factors(found)["norm"] / random_factors(found)["h"][:, None]
    assert torch.allclose(whole["up"], by_hand)


def test_refusals() -> None:
    weights = {"up": torch.ones(2, 1), "down": torch.ones(1, 2)}
    found = places(weights, declare(weights, {"up": "> hidden, 1", "down": "1, < hidden"}))
    for factors, said in (
        ({"hiden": torch.ones(2)}, "did you mean 'hidden'"),
        ({"hidden": torch.ones(3)}, "takes 2 factors"),
        ({"hidden": torch.tensor([1.0, 0.0])}, "above 0"),
        ({"hidden": torch.tensor([1.0, torch.nan])}, "above 0"),
    ):
        with pytest.raises(Error, match=said):
            scaled(weights, found, factors)
    shared = torch.ones(2, 2)
    apart = {"up": torch.ones(2, 1), "down": shared, "other": shared.clone()}
    graph = declare(apart, {"up": "> hidden, 1", "down": "2, < hidden", "other": "2, 2"})
    tied = apart | {"other": shared}
    assert places(tied, graph) == ()
    with pytest.raises(Error, match="one tensor"):
        scaled(tied, places(apart, graph), {"hidden": torch.tensor([1.0, 2.0])})


def test_positions_and_units() -> None:
    side = Side("w", 1, torch.tensor([0, 1, -1, 0, 1]))
    values = torch.tensor([1.0, 2.0, 100.0, 3.0, 8.0])
    assert by_unit(side, values, "mean").tolist() == [2.0, 5.0]
    assert by_unit(side, values, "maximum").tolist() == [3.0, 8.0]
    assert by_position(side, torch.tensor([3.0, 4.0])).tolist() == [3.0, 4.0, 1.0, 3.0, 4.0]
