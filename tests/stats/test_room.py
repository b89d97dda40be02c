"""One pass for several statistics, shards that add up, and a model that is left as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import Activations, Fisher, Gram, GuidedGram, activations, collect, combine, fisher, gram


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=generator), torch.arange(n) % 4) for n in (4, 1, 6)]


def test_several_statistics_in_one_pass_are_those_of_a_pass_each():
    model, read = network(), []
    source = (read.append(1) or batch for batch in batches())
    found = collect(model, source, {"true": Fisher(), "given": Fisher("given"), "inputs": Gram()})
    assert len(read) == 3
    apart = {
        "true": fisher(model, batches()),
        "given": fisher(model, batches(), labels="given"),
        "inputs": gram(model, batches()),
    }
    for kind, expected in apart.items():
        assert set(found[kind]) == set(expected)
        for name in expected:
            assert torch.equal(found[kind][name], expected[name])
        assert found[kind].metadata["weightsmith.examples"] == "11"


class Failing(Exception):
    pass


def failing(model, batch):
    model(batch[0])
    raise Failing


class Counting(nn.Module):
    """Changes a buffer in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.layer = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


class Replacing(nn.Module):
    """Puts a new tensor in the place of a buffer, and makes another when it is first asked."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.register_buffer("mask", torch.ones(len(x)))
        return self.layer(x)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_the_model_replaces_are_put_back(fails: bool):
    model = Replacing()
    before = model.calls
    try:
        collect(model, batches(), {"gram": Gram()}, forward=failing if fails else None)
        assert not fails
    except Failing:
        assert fails
    assert dict(model.named_buffers()) == {"calls": before}
    assert model.calls is before
    assert not before


def test_the_default_loss_asks_the_model_as_it_is_said_to():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network()

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.layer(x) * scale

    model = Scaled()
    found = collect(
        model,
        batches(),
        {"fisher": Fisher("given"), "guided": GuidedGram()},
        forward=lambda model, batch: model(batch[0], 1.0),
    )
    expected = collect(network(), batches(), {"fisher": Fisher("given"), "guided": GuidedGram()})
    for key, one in expected.items():
        for name in one:
            torch.testing.assert_close(found[key][f"layer.{name}"], one[name])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool):
    model = Counting()
    model.layer[1].eval()
    model(batches()[0][0]).sum().backward()
    before = copy.deepcopy(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    both = {"fisher": Fisher(), "gram": Gram(), "in": Activations(), "out": Activations(of="outputs")}
    try:
        collect(model, batches(), both, forward=failing if fails else None)
        assert not fails
    except Failing:
        assert fails
    for module, other in zip(model.modules(), before.modules(), strict=True):
        assert module.training == other.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for own, other in zip(model.parameters(), before.parameters(), strict=True):
        assert own.requires_grad
        assert torch.equal(own, other)
    for own, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(own.grad, gradient)
    for own, other in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(own, other)


def test_it_asks_in_evaluation_mode():
    """With dropout on, or statistics of the batch, an example's gradient would depend on chance and company."""
    whole, alone = fisher(network(), batches()), fisher(network(), [b for x in batches() for b in singles(x)])
    for name in whole:
        torch.testing.assert_close(whole[name], alone[name])


def singles(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(batch[0]))]


@pytest.mark.parametrize("statistic", [fisher, gram])
def test_shards_come_to_what_one_pass_finds(statistic, tmp_path):
    model, data = network(), batches()
    whole = statistic(model, data)
    parts = [statistic(model, [batch]) for batch in data]
    parts[0].save(tmp_path / "part.safetensors")
    found = combine(ws.open(tmp_path / "part.safetensors"), *parts[1:])
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-6, atol=1e-9)
    assert found.metadata == whole.metadata
    nested = combine(combine(parts[0], parts[1]), parts[2])
    for name in whole:
        torch.testing.assert_close(nested[name], whole[name], rtol=1e-6, atol=1e-9)
    assert combine(whole)["0.weight"].equal(whole["0.weight"])


def test_what_cannot_be_combined_is_refused():
    model, data = network(), batches()
    with pytest.raises(Error, match="at least 1 statistic, got 0"):
        combine()
    with pytest.raises(Error, match="of one kind, got fisher, gram"):
        combine(fisher(model, data), gram(model, data))
    with pytest.raises(Error, match="do not say of how many examples"):
        combine(ws.open(model))
    with pytest.raises(Error, match=r"the second lacks 0\.weight"):
        combine(gram(model, data), gram(model, data, pattern="4.*"))


def test_no_data_and_no_statistic_are_refused():
    with pytest.raises(Error, match="at least one batch"):
        fisher(network(), [])
    with pytest.raises(Error, match="at least one statistic"):
        collect(network(), batches(), {})
    with pytest.raises(Error, match="a batch is a tensor, a tuple or a mapping"):
        gram(network(), ["words"])
    with pytest.raises(Error, match=r"fits '\*': this model has none"):
        gram(nn.ReLU(), [torch.ones(1, 2)])


def test_labels_of_mappings_are_not_shown_to_the_model():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner(pixels)

    given = fisher(Named(), [{"pixels": x, "labels": y} for x, y in batches()], labels="given")
    expected = fisher(network(), batches(), labels="given")
    for name in expected:
        assert torch.equal(given[f"inner.{name}"], expected[name])


def test_a_model_without_logits_is_refused():
    with pytest.raises(Error, match="without logits; give forward="):
        fisher(Pair(), batches())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor):
        return self.layer(x), x


class Routed(nn.Module):
    """Its second layer is called only where the data say so."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.always, self.rare, self.never = (nn.Linear(3, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.rare(x) if bool((x > 5).any()) else 0)


KINDS = {
    "gram": Gram(),
    "weighted": Gram(tokens=lambda batch: batch[1].float() + 0.5),
    "blocks": Gram(form=1),
    "diagonal": Gram(form="diagonal"),
    "fisher": Fisher("given"),
    "guided": GuidedGram(2),
    **{what: Activations(what) for what in ("norm", "mean", "mean_absolute", "maximum", "second_moment")},
}


def uneven() -> list[tuple[Tensor, Tensor]]:
    data = batches()
    data[2][0][0, 0] = 6.0
    return data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_layer_that_a_shard_never_called_is_combined_of_the_others(kind: str, order: tuple[int, ...], tmp_path):
    model, data = Routed(), uneven()
    whole = collect(model, data, {"x": KINDS[kind]})["x"]
    shards = [collect(model, [data[number]], {"x": KINDS[kind]})["x"] for number in order]
    shards[1].save(tmp_path / "shard.safetensors")
    shards[1] = ws.open(tmp_path / "shard.safetensors")
    for found in (combine(*shards), combine(combine(shards[0], shards[1]), shards[2])):
        assert set(found) == set(whole)
        assert found.metadata["weightsmith.examples"] == "11"
        for name in whole:
            torch.testing.assert_close(found[name], whole[name], rtol=1e-6, atol=1e-7)
        if kind != "fisher":
            expected = {"always.weight": 11.0, "rare.weight": 6.0, "never.weight": 0.0}
            if kind == "weighted":
                expected = {"always.weight": 5.5 + 13 + 3, "rare.weight": 3 + 7, "never.weight": 0}
                expected["always.weight"] = sum(float(labels.sum()) + len(labels) / 2 for _, labels in data)
                expected["rare.weight"] = float(data[2][1].sum()) + 3
            assert json.loads(found.metadata["weightsmith.rows"]) == expected
    found.save(tmp_path / "all.safetensors")
    again = ws.open(tmp_path / "all.safetensors")
    for name in whole:
        assert torch.equal(again[name], found[name])


def test_combining_is_exact_to_the_rounding_at_the_end():
    parts = [torch.tensor([16777216.0]), torch.tensor([1.0]), torch.tensor([1.0])]
    shards = [collect(nn.Linear(1, 1), [part.sqrt()[None]], {"x": Gram()})["x"] for part in parts]
    assert float(combine(*shards)["weight"]) == 16777218


def test_layers_that_share_a_matrix_share_it_when_combined():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    shards = [gram(Both(), [batch]) for batch in batches()]
    assert combine(*shards).ties == {"second.weight": "first.weight"}


def test_shards_of_other_forms_or_without_counts_are_refused():
    model, data = network(), batches()
    with pytest.raises(Error, match=r"combine: 0\.weight: shapes \[3, 3\] and \[3\] do not fit"):
        combine(gram(model, data), gram(model, data, form="diagonal"))
    means = [activations(model, [batch], what="mean").rename(lambda name: f"model.{name}") for batch in data]
    with pytest.raises(Error, match=r"does not say on how many rows model\.0\.weight rests; combine before renaming"):
        combine(*means)
    with pytest.raises(Error, match=r"the second lacks 0\.weight"):  # it was called there, and dropped afterwards
        combine(gram(model, data), gram(model, data).drop("0.*"))


def test_a_batch_may_carry_other_things_beside_a_mask():
    """What is recorded before a block of a language model: hidden states, a mask, a mask of attention, positions."""
    layer, tokens = nn.Linear(3, 3), torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"hidden": tokens, "attention_mask": mask, "positions": (torch.arange(4), None), "cache": None}

    def forward(model, batch):
        assert batch["cache"] is None
        return model(batch["hidden"])

    kept = tokens[mask.bool()]
    asked = {"gram": Gram(), "norm": Activations()}
    found = collect(layer, [batch], asked, forward=forward)
    torch.testing.assert_close(found["gram"]["weight"], kept.T @ kept)
    torch.testing.assert_close(found["norm"]["weight"], kept.square().sum(dim=0).sqrt())
    wide = batch | {"attention_mask": torch.zeros(2, 1, 4, 4)}  # of another kind: it says nothing of tokens
    rows = tokens.flatten(0, 1)
    torch.testing.assert_close(collect(layer, [wide], asked, forward=forward)["gram"]["weight"], rows.T @ rows)
