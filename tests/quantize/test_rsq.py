"""Tokens that count as much as attention they receive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize import rsq
from weightsmith.quantize._rsq import AttentionGram, important, received


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Columns of softmax(q k' / sqrt d), with a loop."""
    n, heads, length, width = query.shape
    query, key = query.detach(), key.detach()
    total = torch.zeros(n, length)
    for text in range(n):
        for head in range(heads):
            for here in range(length):
                scores = [
                    float(query[text, head, here] @ key[text, head, there]) / width**0.5 for there in range(length)
                ]
                shares = torch.softmax(torch.tensor(scores).masked_fill(~mask[here], -torch.inf), 0)
                total[text] += shares
    return total


@pytest.mark.parametrize("how", ["causal", "bool", "float", "none", "grouped"])
def test_what_tokens_receive(how: str):
    query, key, value = (some(2, 4, 5, 3, seed=seed) for seed in range(3))
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    options: dict[str, Any] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": ~later},
        "float": {"attn_mask": torch.zeros(5, 5).masked_fill(later, -torch.inf)},
        "none": {},
        "grouped": {"is_causal": True, "enable_gqa": True},
    }[how]
    given = key[:, :2] if how == "grouped" else key
    own = value[:, :2] if how == "grouped" else value
    full = given.repeat_interleave(2, 1) if how == "grouped" else given
    expected = by_hand(query, full, torch.ones_like(later) if how == "none" else ~later)
    found = received(lambda: functional.scaled_dot_product_attention(query, given, own, **options))
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("call", [
    lambda scores: functional.softmax(scores, dim=-1), lambda scores: torch.softmax(scores, -1),
    lambda scores: scores.softmax(dim=-1), lambda scores: nn.Softmax(-1)(scores),
])  # fmt: skip
def test_softmaxes_are_seen_too(call: Any):
    scores = some(2, 3, 4, 4)
    found = received(lambda: call(scores))
    assert found is not None
    torch.testing.assert_close(found, scores.softmax(-1).sum((1, 2)))


def test_what_is_no_attention_between_tokens_is_not_seen():
    assert received(lambda: functional.softmax(some(2, 3, 4, 5), dim=-1)) is None
    assert received(lambda: functional.softmax(some(2, 3, 4, 4), dim=1)) is None
    assert received(lambda: functional.softmax(some(4, 4), dim=-1)) is None
    query, key = some(1, 1, 3, 2), some(1, 1, 5, 2)
    assert received(lambda: functional.scaled_dot_product_attention(query, key, key)) is None


def test_padding_neither_attends_nor_receives():
    query, key = some(2, 2, 5, 3), some(2, 2, 5, 3, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    attend = mask.bool()[:, None, None, :]
    found = received(lambda: functional.scaled_dot_product_attention(query, key, key, attn_mask=attend), mask)
    alone = received(lambda: functional.scaled_dot_product_attention(*(x[1:, :, :3] for x in (query, key, key))))
    assert found is not None
    assert alone is not None
    torch.testing.assert_close(found[1], torch.cat([alone[0], torch.zeros(2)]))
    assert found[0].sum() == pytest.approx(10)


def test_token_weights():
    given = torch.tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 2.0]])
    found = important(given, 0.2, 1.0)
    line = torch.tensor([0.2, 1.0, 0.6])
    torch.testing.assert_close(found[0], line / line.mean())
    torch.testing.assert_close(found[1], torch.ones(3))
    masked = important(given, 0.2, 1.0, torch.tensor([[1, 0, 1], [0, 0, 1]]))
    torch.testing.assert_close(masked, torch.tensor([[1 / 3, 0, 5 / 3], [0, 0, 1]]))
    assert important(given, 0.0, 1.0, torch.zeros(2, 3)).isfinite().all()
    for low, high in ((-1.0, 1.0), (2.0, 1.0), (0.0, 0.0), (0.0, float("inf"))):
        with pytest.raises(Error, match="low and high are token weights"):
            important(given, low, high)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 3)).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.up(seen.transpose(1, 2).flatten(2))


def model_and_data(count: int = 2) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count))), [torch.randn(2, 7, 6) for _ in range(3)]


def test_gram_matrices_are_weighted_with_what_each_block_attends_to():
    model, data = model_and_data(1)
    found = ws.stats.collect(model, data, {"g": AttentionGram(low=0.1, high=2.0)})["g"]
    block: Any = model[0]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for x in data:
        q, k = (part(x).unflatten(-1, (2, 3)).transpose(1, 2) for part in (block.q, block.k))
        weights = important(by_hand(q, k, torch.ones(7, 7, dtype=torch.bool).tril()), 0.1, 2.0)
        expected += (x.flatten(0, 1).T @ (x * weights[..., None]).flatten(0, 1)).double()
    torch.testing.assert_close(found["0.q.weight"], expected.float(), rtol=1e-4, atol=1e-4)
    assert found["0.q.weight"] is found["0.v.weight"]


def test_block_by_block_it_is_sequential_with_these_weights():
    model, data = model_and_data()
    found = rsq(model, data, bits=3, low=0.2)
    kept: list[Tensor] = []
    gram = ws.stats.collect(model[:1], data, {"g": AttentionGram(sums=torch.float32, low=0.2)})["g"]
    first = ws.quantize.gptq(model[:1], stats=gram, bits=3)
    for name in first:
        assert torch.equal(found[name], first[name]), name
    # The weights of each batch, given by hand, lead to the same.
    for x in data:
        had = received(lambda x=x: model[0](x))
        assert had is not None
        kept.append(important(had, 0.2))
    usual = ws.stats.Gram(tokens=lambda batch: kept[batch["batch"]], sums=torch.float32)
    same = ws.quantize.sequential(model, data, "gptq", gram=usual, bits=3)
    assert all(torch.equal(found[name], same[name]) for name in first)
    plain = ws.quantize.sequential(model, data, "gptq", bits=3)
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_with_equal_weights_it_is_sequential():
    model, data = model_and_data()
    found = rsq(model, data, bits=3, low=1.0, high=1.0)
    plain = ws.quantize.sequential(model, data, "gptq", bits=3)
    for name in plain:
        assert torch.equal(found[name], plain[name]), name


def test_the_model_is_left_as_it_was():
    model, data = model_and_data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rsq(model.train(), data, bits=3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hugging_face_model_attends_however_it_is_made(shared_llama: Path, attention: str):
    transformers = pytest.importorskip("transformers", reason="runs Hugging Face models")
    model = transformers.AutoModelForCausalLM.from_pretrained(shared_llama, attn_implementation=attention).eval()
    words = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    batch = {"input_ids": words, "attention_mask": mask}
    found = received(lambda: model(**batch), mask)
    eager = transformers.AutoModelForCausalLM.from_pretrained(shared_llama, attn_implementation="eager").eval()
    with torch.no_grad():
        layers = eager(**batch, output_attentions=True).attentions
    expected = (torch.stack(layers).sum((0, 2)) * mask[:, :, None]).sum(1) * mask
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    done = rsq(shared_llama, [batch], bits=3, model=model)
    assert sum(name.endswith("_packed") for name in done) == 21


def test_refusals():
    model, data = model_and_data()
    for name in ("gram", "propagate"):
        with pytest.raises(Error, match=f"rsq has its own {name}="):
            rsq(model, data, **{name: None})
    with pytest.raises(Error, match="no attention between the tokens of a batch was seen"):
        rsq(nn.Sequential(nn.Linear(6, 6)), data, bits=3)
    with pytest.raises(Error, match="low and high"):
        rsq(model, data, low=2.0, high=1.0)
    with pytest.raises(Error, match="tokens= are those of attention here"):
        AttentionGram(tokens=lambda batch: torch.ones(1))


@pytest.mark.parametrize("asked", [{}, {"average_attn_weights": False}, {"need_weights": False}])
def test_the_attention_of_torch_modules_is_seen_and_their_results_are_theirs(asked: dict[str, bool]):
    generator = torch.Generator().manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    given = torch.randn(3, 5, 8, generator=generator)
    expected = layer(given, given, given, average_attn_weights=False)[1].sum((1, 2))
    plain, seen = layer(given, given, given, **asked), []
    found = received(lambda: seen.append(layer(given, given, given, **asked)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(seen[0], plain, rtol=1e-5, atol=1e-6)
    whole = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inner = received(lambda: whole(given))
    assert inner is not None
    torch.testing.assert_close(inner.sum(1), torch.full((3,), 2 * 5.0))
