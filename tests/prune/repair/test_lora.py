"""Changes of low rank that keep zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightsmith.adapt import fold
from weightsmith.errors import Error
from weightsmith.prune.repair import masked_lora, scale_lora


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    for name in ("0.weight", "2.weight"):
        weight = made.get_parameter(name)
        weight.data[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    return made


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["masked", "scaled"])
def test_trained_and_folded_it_is_as_sparse_and_gives_the_same(kind: str, dtype: torch.dtype):
    model = network(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(data(dtype))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    factors: Any = masked_lora(model, rank=2) if kind == "masked" else scale_lora(model, "[02].weight", rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(factors) == ["0.weight", "2.weight"]
    torch.testing.assert_close(model(data(dtype)), expected, rtol=1e-2, atol=1e-2)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == 2 * (4 + 4) + 2 * (5 + 12)
    optimizer = torch.optim.Adam(learning, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(data(dtype)).square().sum().backward()
        optimizer.step()
    trained = model(data(dtype))
    fold(model)
    assert torch.equal(model(data(dtype)), trained)
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value == 0, state[name] == 0)
        assert torch.equal(value, state[name]) == (name not in factors)


def test_the_formulas_by_hand():
    masked, scaled = network(), network()
    start = masked[2].weight.detach().clone()
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    low = masked_lora(masked, {"2.weight": mask}, rank=2, alpha=6)["2.weight"]
    with torch.no_grad():
        low.b.normal_(generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(masked[2].weight, torch.where(mask, start + 3 * low.b @ low.a, 0))
    scale = scale_lora(scaled, "2.weight", rank=3)["2.weight"]
    torch.testing.assert_close(scale.b @ scale.a, torch.ones(5, 12))
    with torch.no_grad():
        scale.b.normal_(generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(scaled[2].weight, start * (scale.b @ scale.a))


def test_an_original_is_not_reached_through_its_copy():
    model = network()
    other = copy.deepcopy(model)
    masked_lora(other)
    assert not hasattr(model[2], "parametrizations")
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: masked_lora(nn.Linear(2, 2)), "holds zeros"),
        (lambda m: masked_lora(m, {}), "holds no mask"),
        (lambda m: masked_lora(m, {"2.wight": torch.ones(5, 12).bool()}), "did you mean '2.weight'"),
        (lambda m: masked_lora(m, {"2.weight": torch.ones(5, 12)}), "must be boolean"),
        (lambda m: masked_lora(m, {"2.weight": torch.ones(12, 5).bool()}), "fit a parameter"),
        (lambda m: masked_lora(m, rank=0), "at least 1"),
        (lambda m: scale_lora(m, rank=0), "at least 1"),
        (lambda m: scale_lora(m, "x*"), "no matrix fits"),
    ],
)
def test_what_is_refused(call: Any, says: str):
    model = network()
    with pytest.raises(Error, match=says):
        call(model)
    assert all(p.requires_grad for p in model.parameters())
