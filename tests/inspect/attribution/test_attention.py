"""Attention times its gradient, against maps and gradients taken by hand from every kind of attention code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.attribution import attention_attribution, f_clipscore


class Attention(nn.Module):
    """Two layers; ``kind`` says how attention is written. ``kept`` holds the maps."""

    def __init__(self, kind: str):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
            self.head = nn.Linear(8, 3)
        self.kind, self.kept = kind, []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        for layer in self.layers:
            q, k, v = layer(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
            if self.kind == "eager":
                attention = functional.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
                self.kept.append(attention)
                made = attention @ v
            else:
                made = functional.scaled_dot_product_attention(q, k, v)
            x = x + made.transpose(1, 2).reshape(n, t, 8)
        return self.head(torch.tanh(x[:, -1]))


def data(n: int = 4, t: int = 5) -> Tensor:
    return torch.randn(n, t, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(layers: int, row: int, cut: bool = False) -> Tensor:
    model = Attention("eager")
    found = model(data())[:, 1].sum()
    slopes = torch.autograd.grad(found, model.kept)
    total = torch.zeros(4, 5, dtype=torch.float64)
    for attention, slope in list(zip(model.kept, slopes, strict=True))[-layers:]:
        for n in range(4):
            for head in range(2):
                for j in range(5):
                    one = slope[n, head, row, j]
                    total[n, j] += (one.clamp(min=0) if cut else one) * attention[n, head, row, j]
    return (total / 2 / layers).detach()


@pytest.mark.parametrize("kind", ["eager", "fused"])
@pytest.mark.parametrize(("layers", "row"), [(1, -1), (2, -1), (2, 0)])
def test_the_formula_by_hand(kind, layers, row):
    found = attention_attribution(Attention(kind), data(), target=1, layers=layers, row=row)
    torch.testing.assert_close(found, by_hand(layers, row))


def test_cut_at_zero_and_rows_of_ones_own():
    model = Attention("fused")
    torch.testing.assert_close(
        attention_attribution(model, data(), target=1, layers=2, signed=False), by_hand(2, -1, True)
    )
    rows = [attention_attribution(model, data(), target=1, row=row) for row in range(5)]
    mixed = attention_attribution(model, data(), target=1, row=torch.tensor([4, 0, 2, 1]))
    torch.testing.assert_close(mixed, torch.stack([rows[r][i] for i, r in enumerate((4, 0, 2, 1))]))
    torch.testing.assert_close(attention_attribution(model, data(), target=1, row=None), torch.stack(rows).mean(0))
    torch.testing.assert_close(attention_attribution(model, data(), target=1, layers=None), by_hand(2, -1))


def test_multi_head_modules_and_encoders():
    """``torch.nn.MultiheadAttention`` against the same attention written out."""

    class Module(nn.Module):
        def __init__(self, written_out: bool):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
                self.head = nn.Linear(8, 3).double()
            self.written_out = written_out

        def forward(self, x: Tensor) -> Tensor:
            if not self.written_out:
                return self.head(torch.tanh(self.attention(x, x, x, need_weights=False)[0][:, -1]))
            q, k, v = functional.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias).chunk(3, dim=-1)
            q, k, v = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in (q, k, v))
            made = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v
            return self.head(torch.tanh(self.attention.out_proj(made.transpose(1, 2).flatten(2))[:, -1]))

    one, other = (attention_attribution(Module(out), data(), target=2) for out in (False, True))
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, other)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 2).double()
    )
    assert attention_attribution(model, data(), target=0).shape == (4, 5)


def test_masks_groups_and_scales_are_those_of_the_fused_kernel():
    q, k, v = (torch.randn(2, h, 5, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 3))
    v = v[:, :2]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[3, 1] = False

    class Fused(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            self.settings, self.made = settings, None

        def forward(self, x: Tensor) -> Tensor:
            self.made = functional.scaled_dot_product_attention(x, k, v, enable_gqa=True, **self.settings)
            return self.made.flatten(1).sum(1)

    for settings in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float().log(), "scale": 0.3}, {}):
        model = Fused(**settings)
        plain = model(q), model.made
        found = attention_attribution(model, q, row=3)
        torch.testing.assert_close(model.made.detach(), plain[1])
        if "attn_mask" in settings:
            assert found[:, 1].abs().max() == 0
        if settings:
            assert found[:, 4].abs().max() == 0


def test_language_models_give_the_same_whatever_their_attention():
    transformers = pytest.importorskip("transformers", reason="a Hugging Face model")
    found = {}
    for kind in ("eager", "sdpa"):
        settings = transformers.LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation=kind,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(settings)
        assert model.config._attn_implementation == kind
        batch = {"input_ids": torch.arange(12).reshape(2, 6)}
        found[kind] = attention_attribution(model, batch, target=(5, 7))
    assert found["eager"].shape == (2, 6)
    torch.testing.assert_close(found["eager"], found["sdpa"])


def test_a_score_for_captions_by_hand():
    parts = torch.tensor([[0.3, -0.2, -0.1, -1e-6], [0.1, 0.2, 0.3, 0.4]])
    similarity = torch.tensor([0.25, -0.5])
    torch.testing.assert_close(f_clipscore(parts, similarity), torch.tensor([-0.3 * 0.75, 0.0]))
    mask = torch.tensor([[True, False, True, True]] * 2)
    torch.testing.assert_close(f_clipscore(parts, similarity, mask=mask), torch.tensor([-0.075, 0.0]))
    torch.testing.assert_close(f_clipscore(parts - 1, similarity, threshold=-0.85)[1], torch.tensor(-0.9))
    with pytest.raises(Error, match=r"got \[2, 4\] and \[3\]"):
        f_clipscore(parts, torch.ones(3))
    with pytest.raises(Error, match=r"mask \[2, 3\]"):
        f_clipscore(parts, similarity, mask=mask[:, :3])


def test_the_model_is_left_as_it_was():
    model = Attention("fused").train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attention_attribution(model, data(), target=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_it_refuses():
    with pytest.raises(Error, match="showed no attention"):
        attention_attribution(nn.Sequential(nn.Linear(8, 3), nn.Flatten(), nn.Linear(15, 1)).double(), data())
    with pytest.raises(Error, match="layers is at least 1, got 0"):
        attention_attribution(Attention("eager"), data(), target=0, layers=0)
    with pytest.raises(Error, match="say with target="):
        attention_attribution(Attention("eager"), data())

    class Shrinking(Attention):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return super().forward(x[:, :3])

    with pytest.raises(Error, match="have different shapes"):
        attention_attribution(Shrinking("eager"), data(), target=0)
