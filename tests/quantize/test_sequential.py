"""Block after block: what each is given, what comes out, and going on after an interruption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightsmith import stats
from weightsmith.errors import Error
from weightsmith.quantize import Coded, dequantize, gptq, rtn, sequential
from weightsmith.quantize.grids import Integer
from weightsmith.weights import Weights


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))


def data(count: int = 3) -> list[Tensor]:
    return [torch.randn(20, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def by_hand(net: nn.Sequential, changed: bool, **options: Any) -> dict[str, Coded]:
    """Gram matrices with what the blocks before give, dense or quantized, one layer after the other."""
    done, found = copy.deepcopy(net), {}
    for index, block in enumerate(net):
        given = torch.cat(data())
        for before in (done if changed else net)[:index]:
            given = before(given)
        given = given.detach()
        coded = gptq(block[0].weight.detach(), given.T @ given, **options)
        done[index][0].weight.data = coded.values()
        found[f"{index}.0.weight"] = coded
    return found


@pytest.mark.parametrize("propagate", ["changed", "dense"])
def test_each_block_is_quantized_for_what_it_is_given(propagate: str):
    net = network()
    before = copy.deepcopy(net.state_dict())
    options: dict[str, Any] = {"bits": 2, "group": 4, "symmetric": False}
    found = sequential(net, data(), "gptq", propagate=propagate, **options)
    expected = by_hand(net, propagate == "changed", **options)
    back = dequantize(found)
    for name, coded in expected.items():
        torch.testing.assert_close(back[name], coded.values(), atol=1e-5, rtol=1e-4)
    values = sequential(net, data(), "gptq", propagate=propagate, action="values", **options)
    assert list(values) == list(before)
    for name, value in before.items():
        assert torch.equal(values[name], back[name])
        assert torch.equal(net.state_dict()[name], value)
    other = by_hand(net, propagate != "changed", **options)
    assert any(not torch.equal(expected[name].codes, other[name].codes) for name in expected)


def test_rounding_to_nearest_needs_no_statistics():
    net = network()
    found = sequential(net, data(1), "rtn", bits=4)
    assert all(torch.equal(found[name], rtn(net, bits=4)[name]) for name in rtn(net, bits=4))
    assert found.lineage.method == "quantize.sequential"


def test_a_kernel_of_ones_own_gets_weight_and_gram():
    seen = []

    def mine(weight: Tensor, gram: Tensor, *, grid: Integer, gain: float = 1.0) -> Coded:
        seen.append((tuple(weight.shape), tuple(gram.shape), gain))
        return rtn(weight * gain, grid=grid)

    back = dequantize(sequential(network(), data(1), mine, bits=8, gain=2.0))
    assert [one for one in seen if one[2] == 2.0 and one[0] == (8, 8)] == [((8, 8), (8, 8), 2.0)] * 3
    torch.testing.assert_close(back["0.0.weight"], 2 * network()[0][0].weight, atol=0.02, rtol=0)


@pytest.mark.parametrize("action", ["codes", "values"])
def test_a_job_that_was_killed_goes_on_to_the_same_bytes(action: str, tmp_path: Path):
    net = network()
    options: dict[str, Any] = {"bits": 3, "group": 4, "action": action}
    whole = sequential(net, data(), "gptq", **options)
    calls = 0

    def dies(weight: Tensor, gram: Tensor, *, grid: Integer) -> Coded:
        nonlocal calls
        calls += weight.shape == (8, 8)
        if calls == 3:
            raise KeyboardInterrupt
        return gptq(weight, gram, grid=grid)

    dies.__name__ = "gptq"
    with pytest.raises(KeyboardInterrupt):
        sequential(net, data(), dies, store=tmp_path / "s", **options)
    with pytest.raises(Error, match="resume=True"):
        sequential(net, data(), "gptq", store=tmp_path / "s", **options)
    found = sequential(net, data(), "gptq", store=tmp_path / "s", resume=True, **options)
    assert list(found) == list(whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert found.metadata == whole.metadata


def test_token_weights_reach_the_gram_matrices():
    net = network()

    def first_half(_: Any) -> Tensor:
        return (torch.arange(20) < 10).float()

    found = sequential(net, data(1), "gptq", bits=2, gram=stats.Gram(tokens=first_half), pattern="0.*weight")
    rows = data(1)[0][:10]
    expected = gptq(net[0][0].weight.detach(), rows.T @ rows, bits=2)
    torch.testing.assert_close(dequantize(found)["0.0.weight"], expected.values())


def test_a_language_model_in_a_folder(llama: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="loads a Hugging Face model")
    from weightsmith import calibration

    batches = calibration.texts(llama, [llama.parent / "near.txt"], samples=4, length=32)
    sequential(llama, batches, "gptq", bits=4, group=8).save(tmp_path / "q")
    back = dequantize(tmp_path / "q")
    back.save(tmp_path / "floats")
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    tokens = batches[0]["input_ids"]
    apart = (model(tokens).logits - dense(tokens).logits).abs().mean()
    assert 0 < apart < 0.5 * dense(tokens).logits.std()
    embedding = "model.embed_tokens.weight"
    assert torch.equal(back[embedding], Weights.of(dense.state_dict())[embedding])


class Mixture(nn.Module):
    """An expert that is never asked, beside one that always is."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(x)


def test_layers_that_no_token_reached_are_rounded_to_nearest():
    torch.manual_seed(0)
    net = nn.Sequential(Mixture(), Mixture())
    with pytest.warns(UserWarning, match=r"no token reached 0\.idle\.weight: rounded to nearest"):
        found = dequantize(sequential(net, data(), "gptq", bits=3))
    assert torch.equal(found["0.idle.weight"], rtn(net[0].idle.weight.detach(), bits=3).values())
    assert not torch.equal(found["0.asked.weight"], rtn(net[0].asked.weight.detach(), bits=3).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gpt"}, r"there is no rounding 'gpt' \(did you mean 'gptq'\?\)"),
        ({"method": "sequential"}, "sequential is no rounding of one layer at a time"),
        ({"bits": 11}, "bits must be a whole number from 1 to 8, got 11"),
        ({"group": 5}, r"0\.0\.weight, .*groups of 5 do not fill a row of 8 inputs"),
        ({"dampen": 1}, "gptq has no option 'dampen'"),
        ({"action": "bits"}, "action is 'codes' or 'values'"),
        ({"order": "size"}, "order is 'given' or 'activation'"),
    ],
)
def test_refusals_before_any_work(options: dict[str, Any], message: str):
    with pytest.raises(Error, match=message):
        sequential(network(), iter(()), **options)


def test_tied_weights_are_refused():
    net = network()
    net[1][0].weight = net[0][0].weight
    with pytest.raises(Error, match="several names"):
        sequential(net, data(), "gptq")
