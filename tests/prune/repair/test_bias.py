"""The mean of each output is restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.repair import bias_correction


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 5, bias=False), nn.Linear(5, 4))


@pytest.mark.parametrize("layer", ["0", "3"])
def test_mean_outputs_are_what_they_were(layer: str):
    model = network()
    data = 1 + torch.randn(40, 2, 4, generator=torch.Generator().manual_seed(1))
    means = ws.stats.activations(model, [data], what="mean")
    pruned = ws.prune.magnitude(model, 0.6, pattern=f"{layer}.weight")  # one layer, so that its inputs stay
    found = bias_correction(model, pruned, means)
    given, inputs = model.get_submodule(layer), data if layer == "0" else model[:3](data)
    expected = given(inputs).mean(dim=0) if layer == "3" else given(inputs).mean(dim=(0, 2))
    before = given.state_dict()["bias"].clone()
    given.load_state_dict({"weight": found[f"{layer}.weight"], "bias": found[f"{layer}.bias"]})
    outputs = given(inputs)
    torch.testing.assert_close(outputs.mean(dim=0) if layer == "3" else outputs.mean(dim=(0, 2)), expected)
    assert not torch.allclose(given.bias, before)
    other = "3" if layer == "0" else "0"
    assert torch.equal(found[f"{other}.bias"], network().state_dict()[f"{other}.bias"])
    assert list(found) == list(pruned)
    assert torch.equal(found["2.weight"], pruned["2.weight"])


def test_by_hand_and_in_its_dtype():
    weights = {"l.weight": torch.tensor([[1.0, 2.0]]).bfloat16(), "l.bias": torch.ones(1).bfloat16()}
    pruned = weights | {"l.weight": torch.tensor([[0.0, 1.5]]).bfloat16()}
    found = bias_correction(weights, pruned, {"l.weight": torch.tensor([3.0, 4.0])})
    assert found["l.bias"].tolist() == [1 + 3 + 2]
    assert found["l.bias"].dtype == torch.bfloat16


def test_what_is_refused():
    weights = {"l.weight": torch.ones(2, 3), "l.bias": torch.ones(2), "m.weight": torch.ones(2, 2)}
    with pytest.raises(Error, match="do not hold"):
        bias_correction(weights, weights, {"x.weight": torch.ones(3)})
    with pytest.raises(Error, match=r"no layer of m\.weight has a bias"):
        bias_correction(weights, weights, {"m.weight": torch.ones(2)})
    with pytest.raises(Error, match="does not fit its weight"):
        bias_correction(weights, weights, {"l.weight": torch.ones(2)})
    with pytest.raises(Error, match="before and after"):
        bias_correction(weights, {"l.weight": torch.ones(2, 3)}, {"l.weight": torch.ones(3)})
    with pytest.raises(Error, match="not finite"):
        bias_correction(weights, weights, {"l.weight": torch.full((3,), torch.nan)})["l.bias"]
