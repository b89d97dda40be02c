"""Networks seen from another side answer alike, whatever their architecture."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.quantize.transforms._networks import answers, network, state, traced
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.graph import declare
from weightsmith.quantize.transforms import karhunen_loeve, mambaquant, random_orthogonal, rotate

DECODERS = ("llama", "qwen3", "phi3", "gpt2", "vit")


def loaded(model: nn.Module, weights: ws.Weights) -> nn.Module:
    """A copy of the model with the weights, and its tied embedding made two."""
    again = copy.deepcopy(model)
    head = getattr(again, "lm_head", None)
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    weights.load_into(again)
    return again


@pytest.mark.parametrize("options", [{}, {"heads": None, "stream": "random"}, {"stream": None, "seed": 4}])
@pytest.mark.parametrize("name", DECODERS)
def test_the_function_stays(name: str, options: dict[str, Any]) -> None:
    model, inputs = network(name)
    before, held = answers(model, inputs), state(model)
    new = rotate(model, traced(name), **options)
    assert torch.allclose(answers(loaded(model, new), inputs), before, atol=5e-5)
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())
    block = next(key for key in new if "layers.1." in key or ("h.1." in key and "weight" in key)).split(".1.")[0]
    moved = {
        key.split(".1.")[1] for key in new if key.startswith(f"{block}.1.") and not torch.equal(new[key], held[key])
    }
    values = {"gpt2": "c_attn", "phi3": "qkv_proj"}.get(name, "v_proj")
    assert any(values in key for key in moved)
    assert (len(moved) <= 3) == ("stream" in options and options["stream"] is None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plain_folder_comes_out(name: str, tmp_path) -> None:
    model, inputs = network(name)
    model.save_pretrained(tmp_path / "in")
    rotate(tmp_path / "in").save(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert not again.config.tie_word_embeddings
    assert torch.allclose(answers(again, inputs), answers(model, inputs), atol=5e-5)


def test_outliers_of_a_stream_are_spread() -> None:
    model, _inputs = network("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 20
    new = rotate(model, traced("llama"))
    before, after = (
        weight.abs().amax(0) for weight in (model.model.embed_tokens.weight, new["model.embed_tokens.weight"])
    )
    assert before.max() / before.median() > 10
    assert after.max() / after.median() < 2


def test_seeds_and_spaces_have_turns_of_their_own() -> None:
    model, _ = network("qwen3")
    one, same, other = (rotate(model, traced("qwen3"), seed=seed) for seed in (1, 1, 2))
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.allclose(one[name], other[name])


def test_a_matrix_of_ones_own_must_be_orthogonal_and_keep_means() -> None:
    model, inputs = network("vit")
    with pytest.raises(Error, match="vector of ones"):
        rotate(model, traced("vit"), stream=random_orthogonal(24))
    model, inputs = network("qwen3")
    with pytest.raises(Error, match="not orthogonal"):
        rotate(model, traced("qwen3"), stream=2 * torch.eye(24))
    turn = random_orthogonal(24, seed=9)
    new = rotate(model, traced("qwen3"), stream=turn, heads=None)
    assert torch.allclose(new["model.embed_tokens.weight"].double(), model.model.embed_tokens.weight.double() @ turn.T)
    assert torch.allclose(answers(loaded(model, new), inputs), answers(model, inputs), atol=5e-5)
    with pytest.raises(Error, match="'hadamard', 'random'"):
        rotate(model, traced("qwen3"), stream="haar")  # type: ignore[arg-type]


def test_norms_behind_blocks_are_refused() -> None:
    weights = {"embed": torch.ones(3, 2), "norm": torch.tensor([1.0, 2.0]), "up": torch.ones(4, 2)}
    graph = declare(weights, {"embed": "3, > s", "norm": "s", "up": "4, < s"}, spaces={"s": {"flags": ["rms_norm"]}})
    with pytest.raises(Error, match="could be brought together"):
        rotate(weights, graph)
    with pytest.raises(Error, match=r"graph\.trace"):
        rotate(nn.Linear(2, 2))
    new = rotate(weights, graph, gains={"norm": ["up"]}).to_dict()
    before = weights["embed"] * weights["norm"] @ weights["up"].T
    assert torch.allclose(new["embed"] * new["norm"] @ new["up"].T, before, atol=1e-6)


def moments(model: nn.Module, inputs, names: list[str]) -> list[torch.Tensor]:
    grams = ws.stats.gram(model, [inputs])
    return [grams[name].double() for name in names]


def test_mambaquant_makes_all_units_of_a_stream_equal() -> None:
    model, inputs = network("qwen3")
    grams = ws.stats.gram(model, [inputs])
    new = mambaquant(model, traced("qwen3"), stats=grams)
    again = loaded(model, new)
    assert torch.allclose(answers(again, inputs), answers(model, inputs), atol=5e-5)
    after = ws.stats.gram(again, [inputs])
    # All that reads the stream, each input once; and by heads, what reads the values.
    names = ["self_attn.q_proj", "mlp.gate_proj"]
    stream = sum(after[f"model.layers.{i}.{name}.weight"].diagonal() for i in range(2) for name in names)
    stream = stream + after["lm_head.weight"].diagonal()
    assert stream.max() / stream.min() == pytest.approx(1, abs=1e-3)
    for layer in range(2):
        values = after[f"model.layers.{layer}.self_attn.o_proj.weight"].diagonal().view(6, 4).sum(0)
        assert values.max() / values.min() == pytest.approx(1, abs=1e-3)
    plain = ws.stats.gram(loaded(model, rotate(model, traced("qwen3"))), [inputs])
    stream = sum(plain[f"model.layers.{i}.{name}.weight"].diagonal() for i in range(2) for name in names)
    assert stream.max() / stream.min() > 1.5  # a Hadamard turn alone does not


def test_mambaquant_leaves_what_it_knows_nothing_of_and_refuses_means() -> None:
    model, inputs = network("llama")
    new = mambaquant(model, traced("llama"), stats={})
    assert torch.allclose(answers(loaded(model, new), inputs), answers(model, inputs), atol=5e-5)
    assert torch.equal(new["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    model, inputs = network("vit")
    with pytest.raises(Error, match="take the mean away"):
        mambaquant(model, traced("vit"), stats=ws.stats.gram(model, [inputs]))


def test_mambaquant_reads_statistics_of_a_file_as_those_in_memory(tmp_path) -> None:
    model, inputs = network("qwen3")
    grams = ws.stats.gram(model, [inputs])
    grams.save(tmp_path / "grams.safetensors")
    told, seen = (
        mambaquant(model, traced("qwen3"), stats=stats) for stats in (ws.open(tmp_path / "grams.safetensors"), grams)
    )
    assert torch.allclose(told["model.embed_tokens.weight"], seen["model.embed_tokens.weight"], atol=1e-5)
    broken = {name: torch.full_like(grams[name], torch.nan) for name in grams}
    with pytest.raises(Error, match="finite"):
        mambaquant(model, traced("qwen3"), stats=broken)


def test_karhunen_loeve() -> None:
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12)
    moment = x.T @ x
    turn = karhunen_loeve(moment)
    even = (turn @ moment.double() @ turn.T).diagonal()
    assert torch.allclose(even, (moment.double().trace() / 12).expand(12))
    assert torch.allclose(turn @ turn.T, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(karhunen_loeve(torch.zeros(4, 4)).abs(), torch.full((4, 4), 0.5, dtype=torch.float64))
    for wrong in (torch.ones(3, 4), torch.full((4, 4), torch.nan), torch.eye(3)):
        with pytest.raises(Error):
            karhunen_loeve(wrong)
