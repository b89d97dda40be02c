"""Gram matrices of fused experts, against a loop over the tokens that were sent to each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import ExpertGram, Gram, _experts, collect, combine, expert_gram


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Experts(nn.Module):
    """Two of four experts a token, by a rule that a test can follow; one expert is never chosen."""

    def __init__(self, how: str = "eager", into: int = 8, hidden: int = 8):
        super().__init__()
        self.how = how
        self.up, self.down = nn.Parameter(random(4, hidden, into)), nn.Parameter(random(4, into, hidden, seed=1))
        self.head = nn.Linear(into, 2)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        chosen = routes(x)
        if self.how == "grouped":
            order = chosen.flatten().argsort(stable=True)
            ends = torch.bincount(chosen.flatten(), minlength=4).cumsum(0).int()
            made = functional.grouped_mm(x[order // 2], self.up.transpose(-2, -1), offs=ends).relu()
            made = functional.grouped_mm(made, self.down.mT, offs=ends)
            return self.head(total.index_add_(0, order // 2, made))
        for expert in range(4):
            which = (chosen == expert).any(dim=1).nonzero()[:, 0]
            up, down = self.up[expert], self.down[expert]
            if self.how == "copies":
                up, down = up.clone(), down.clone()
            made = functional.linear(functional.linear(x[which], weight=up).relu(), down)
            total = total.index_add(0, which, made.to(total.dtype))
        return self.head(total)


def routes(x: Tensor) -> Tensor:
    """Two of the experts 0, 2 and 3 for each token."""
    first = torch.where(x[:, 0] > 0, 0, 2)
    return torch.stack([first, torch.full_like(first, 3)], dim=1)


def by_hand(model: Experts, data: list[Tensor]) -> dict[str, Tensor]:
    up, down = torch.zeros(4, 8, 8, dtype=torch.float64), torch.zeros(4, 8, 8, dtype=torch.float64)
    for batch in data:
        for token in batch:
            for expert in routes(token[None])[0].tolist():
                hidden = (model.up[expert] @ token).relu().detach().double()
                up[expert] += torch.outer(token, token).double()
                down[expert] += torch.outer(hidden, hidden)
    return {"up": up.float(), "down": down.float()}


@pytest.mark.parametrize("form", ["full", "diagonal"])
@pytest.mark.parametrize("how", ["eager", "grouped"])
def test_the_formula_token_by_token(how: str, form: str):
    model, data = Experts(how), [random(9, 8, seed=2), random(1, 8, seed=3)]
    found, expected = expert_gram(model, data, form=form), by_hand(model, data)  # type: ignore[arg-type]
    assert set(found) == {"up", "down"}
    for name in expected:
        value = expected[name] if form == "full" else expected[name].diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
        assert not found[name][1].any()
        assert found[name].dtype == torch.float32


def test_with_others_in_one_pass_over_shards_and_in_files(tmp_path):
    model, data = Experts(), [random(9, 8, seed=2), random(3, 8, seed=3)]
    whole = expert_gram(model, data)
    both = collect(model, data, {"experts": ExpertGram(store=tmp_path), "layers": Gram()})
    assert set(both["layers"]) == {"head.weight"}
    expert_gram(model, data[:1]).save(tmp_path / "shard.safetensors")
    added = combine(ws.open(tmp_path / "shard.safetensors"), expert_gram(model, data[1:]))
    for name in whole:
        assert torch.equal(both["experts"][name], whole[name])
        torch.testing.assert_close(added[name], whole[name], rtol=1e-6, atol=1e-6)
    assert added.metadata == whole.metadata


def test_weights_that_are_not_used_themselves_are_an_error():
    with pytest.raises(Error, match="none of these parameters was seen in a product"):
        expert_gram(Experts("copies"), [random(3, 8)])
    with pytest.raises(Error, match="no weight to gather statistics of fits"):
        expert_gram(nn.Linear(2, 2), [random(3, 2)])


def test_weights_that_lie_the_other_way_round_are_not_taken_for_what_they_are_not():
    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.across, self.usual = nn.Parameter(random(2, 4, 4)), nn.Parameter(random(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = functional.linear(x, self.across[0].T) + functional.linear(x, self.usual[1])
            ends = torch.tensor([1, len(x)], dtype=torch.int32)
            return y + functional.grouped_mm(x, self.across, offs=ends)

    assert set(expert_gram(Across(), [random(3, 4)])) == {"usual"}


def test_a_run_of_the_experts():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(random(4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return functional.grouped_mm(x, self.weight[1:3].mT, offs=torch.tensor([2, 5], dtype=torch.int32))

    x = random(5, 8)
    found = expert_gram(Some(), [x])["weight"]
    expected = torch.stack([torch.zeros(8, 8), x[:2].T @ x[:2], x[2:].T @ x[2:], torch.zeros(8, 8)])
    torch.testing.assert_close(found, expected)


def test_inputs_that_are_not_finite_are_an_error():
    data = [random(3, 8), torch.full((1, 8), torch.nan)]
    with pytest.raises(Error, match="up: its inputs in batch 2 are not finite"):
        expert_gram(Experts(), data)
    with pytest.raises(Error, match="form is one of full, diagonal; got 'blocks'"):
        ExpertGram(form="blocks")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_a_mixture_of_transformers(how: str):
    """Against a loop over tokens and the experts that each was sent to."""
    transformers = pytest.importorskip("transformers", reason="its mixtures of experts")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=50, experts_implementation=how,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))}
    called: dict[str, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda module, given, output, name=name: called.update({name: given}))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    found = expert_gram(model, [batch])
    for hook in hooks:
        hook.remove()
    assert len(called) == 2
    assert set(found) == {f"{name}.{part}_proj" for name in called for part in ("gate_up", "down")}
    for name, (tokens, chosen, _) in called.items():
        experts = model.get_submodule(name)
        up, down = torch.zeros(4, 16, 16), torch.zeros(4, 24, 24)
        for token, numbers in zip(tokens, chosen.tolist(), strict=True):
            for number in numbers:
                gate, value = (experts.gate_up_proj[number] @ token).chunk(2)
                hidden = (functional.silu(gate) * value).detach()
                up[number] += torch.outer(token, token)
                down[number] += torch.outer(hidden, hidden)
        assert bool((up.diagonal(dim1=1, dim2=2).sum(dim=1) > 0).sum() > 1)
        torch.testing.assert_close(found[f"{name}.gate_up_proj"], up, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"{name}.down_proj"], down, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("how", ["eager", "grouped"])
def test_autocast_hides_nothing(how: str):
    model, data = Experts(how), [random(9, 8, seed=2)]

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    found, expected = expert_gram(model, data, forward=forward), expert_gram(model, data)
    assert set(found) == set(expected)
    torch.testing.assert_close(found["up"], expected["up"])
    assert float((found["down"] - expected["down"]).norm() / expected["down"].norm()) < 0.02


def test_squares_that_float32_cannot_hold_are_an_error():
    with pytest.raises(Error, match="too large to be squared in float32"):
        expert_gram(Experts().double(), [random(3, 8).double() * 1e25])


def test_large_inputs_are_taken_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch):
    model, data = Experts(), [random(9, 8, seed=2)]
    monkeypatch.setattr(_experts, "AT_ONCE", 16)
    found, expected = expert_gram(model, data), by_hand(model, data)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
