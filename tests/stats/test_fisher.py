"""Diagonal Fisher information, against sums over classes and examples written out one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.stats import fisher


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def data(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def by_hand(model: nn.Module, inputs: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """``sum_y shares[n, y] (grad log p(y | x_n))^2``, averaged over n, by plain backward passes."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example, share in zip(inputs, shares, strict=True):
        for label in range(shares.shape[1]):
            model.zero_grad()
            model(example[None]).log_softmax(-1)[0, label].backward()
            for name, p in model.named_parameters():
                totals[name] += share[label] * p.grad**2 / len(inputs)
    model.zero_grad()
    return totals


@pytest.mark.parametrize("at_once", [1, 3, 32])
def test_the_true_information_is_the_sum_over_classes(at_once: int):
    model, (inputs, _) = network(), data()
    expected = by_hand(model, inputs, model(inputs).detach().softmax(-1))
    found = fisher(model, [inputs[:5], inputs[5:]], at_once=at_once)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_the_empirical_information_is_that_of_the_labels():
    model, (inputs, labels) = network(), data()
    expected = by_hand(model, inputs, nn.functional.one_hot(labels, 3).double())
    found = fisher(model, [(inputs, labels)], labels="given")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert not torch.allclose(found["0.weight"], fisher(model, [inputs])["0.weight"])


def test_a_softmax_of_three_numbers():
    """For logits alone, ``F = p (1 - p)``: the variance of the indicator of each class."""
    layer = nn.Linear(1, 3)
    found = fisher(layer, [torch.ones(1, 1)])["bias"]
    p = layer(torch.ones(1, 1)).detach().softmax(-1)[0]
    torch.testing.assert_close(found, p * (1 - p))


def test_sampled_labels_come_to_the_sum_over_classes():
    model, (inputs, _) = network(dtype=torch.float32), data()
    exact = fisher(model, [inputs.float()])
    few, many = (fisher(model, [inputs.float()], labels="sampled", draws=draws) for draws in (1, 400))
    for name in exact:
        far = (few[name] - exact[name]).norm() / exact[name].norm()
        near = (many[name] - exact[name]).norm() / exact[name].norm()
        assert near < 0.15
        assert near < far


def test_a_seed_fixes_what_is_drawn():
    model, (inputs, _) = network(), data()
    state = torch.random.get_rng_state()
    one, same, other = (fisher(model, [inputs], labels="sampled", seed=seed)["0.weight"] for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_is_not_the_square_of_the_mean_gradient():
    """Two examples with opposite gradients."""
    layer = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(layer.weight)
    found = fisher(layer, [(torch.ones(2, 1), torch.tensor([0, 1]))], labels="given")["weight"]
    assert found.flatten().tolist() == [0.25, 0.25]


class Awkward(nn.Module):
    """Decides by the data, which vectorised passes cannot."""

    def __init__(self):
        super().__init__()
        self.layer = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("labels", ["all", "given", "sampled"])
def test_a_model_that_cannot_be_vectorised_is_asked_example_by_example(labels):
    batch = data()
    found, expected = fisher(Awkward(), [batch], labels=labels), fisher(network(), [batch], labels=labels)
    for name in expected:
        torch.testing.assert_close(found[f"layer.{name}"], expected[name])


class Text(nn.Module):
    """A causal model of the least kind: the next token from the last, with a tied output."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        logits = self.head(self.embed(input_ids).cumsum(1))
        return type("Output", (), {"logits": logits})()


def texts() -> dict[str, Tensor]:
    ids = torch.tensor([[1, 2, 3, 4], [2, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}


def test_texts_count_next_tokens_and_no_padding():
    model = Text()
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for ids in ([1, 2, 3, 4], [2, 2]):
        model.zero_grad()
        logits = model(torch.tensor([ids])).logits[0]
        sum(logits[t].log_softmax(-1)[ids[t + 1]] for t in range(len(ids) - 1)).backward()
        expected += model.embed.weight.grad**2 / 2
    found = fisher(model, [texts()], labels="given")
    torch.testing.assert_close(found["embed.weight"], expected)
    assert found.ties == {"head.weight": "embed.weight"}


def test_labels_of_a_text_are_sampled_at_every_position_that_counts():
    """Gradients of different positions are independent, so their squares add up on average."""
    model, batch = Text(), texts()
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for ids, places in zip(batch["input_ids"], (3, 1), strict=True):
        for place in range(places):
            for label in range(5):
                model.zero_grad()
                chance = model(ids[None]).logits[0, place].log_softmax(-1)[label]
                chance.backward()
                expected += chance.exp().detach() * model.embed.weight.grad**2 / 2
    found = fisher(model, [batch], labels="sampled", draws=600)["embed.weight"]
    assert (found - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(Error, match=r'labels="all" needs logits \[n, classes\], got \[2, 4, 5\]'):
        fisher(model, [batch])


def test_a_loss_of_ones_own():
    layer = nn.Linear(1, 1, bias=False)
    inputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    slope = layer.weight.item()
    found = fisher(layer, [(inputs, targets)], labels="given", loss=lambda m, b: (m(b[0]) - b[1]).square().sum() / 2)[
        "weight"
    ]
    assert float(found) == pytest.approx((slope**2 + (2 * (2 * slope - 1)) ** 2) / 2, rel=1e-4)
    with pytest.raises(Error, match=r"one number, got \[1, 2\]"):
        fisher(layer, [(inputs.expand(2, 1), targets)], labels="given", loss=lambda m, b: m(b[0]).expand(1, 2))


def test_a_pattern_chooses_and_frozen_weights_count():
    model, (inputs, _) = network(), data()
    expected = fisher(model, [inputs])["2.weight"]
    model.requires_grad_(False)
    found = fisher(model, [inputs], pattern="2.*")
    assert set(found) == {"2.weight", "2.bias"}
    torch.testing.assert_close(found["2.weight"], expected)


def test_what_it_refuses():
    model, (inputs, _) = network(), data()
    with pytest.raises(Error, match="labels is one of all, sampled, given; got 'true'"):
        fisher(model, [inputs], labels="true")  # type: ignore[arg-type]
    with pytest.raises(Error, match="the batches have no labels"):
        fisher(model, [inputs], labels="given")
    with pytest.raises(Error, match="draws is at least 1, got 0"):
        fisher(model, [inputs], labels="sampled", draws=0)
    with pytest.raises(Error, match="fits 'nothing'"):
        fisher(model, [inputs], pattern="nothing")
