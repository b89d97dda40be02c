"""Mean gradients and squares of batches' gradients, against backward passes written out one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import Gradients, Gram, collect, combine, fisher, gradients


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def data(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def batches(*cuts: int) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = data()
    return list(zip(inputs.split(cuts), labels.split(cuts), strict=True))


def by_hand(model: nn.Module, given: list[tuple[Tensor, Tensor]], power: int) -> dict[str, Tensor]:
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    examples = sum(len(labels) for _, labels in given)
    for inputs, labels in given:
        model.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        for name, p in model.named_parameters():
            totals[name] += len(labels) / examples * p.grad**power
    model.zero_grad()
    return totals


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("cuts", [(7,), (5, 2), (1,) * 7])
def test_a_backward_pass_a_batch(power, cuts):
    model, given = network(), batches(*cuts)
    expected = by_hand(model, given, power)
    found = gradients(model, given, power=power)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_the_cut_matters_to_squares_alone():
    model = network()
    for power, alike in ((1, True), (2, False)):
        one, other = (gradients(model, batches(*cuts), power=power)["0.weight"] for cuts in ((7,), (4, 3)))
        assert torch.allclose(one, other) is alike


def test_squares_of_single_examples_are_the_empirical_fisher_information():
    model = network()
    found, expected = gradients(model, batches(*(1,) * 7), power=2), fisher(model, batches(7), labels="given")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("power", [1, 2])
def test_shards_combine(power):
    model = network()
    whole = gradients(model, batches(3, 2, 2), power=power)
    parts = combine(
        gradients(model, batches(3, 2, 2)[:1], power=power), gradients(model, batches(3, 2, 2)[1:], power=power)
    )
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_powers_do_not_mix():
    model = network()
    with pytest.raises(Error, match="one kind"):
        combine(gradients(model, batches(7)), gradients(model, batches(7), power=2))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3)).double().train()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones(3, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = gradients(model, batches(7))
    assert found["0.weight"].any()  # frozen parameters count
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[2].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert model[0].weight.grad is None
    assert torch.equal(model[3].bias.grad, torch.ones(3, dtype=torch.float64))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model[0]._forward_hooks


def test_tied_parameters_get_the_sum_of_both_uses():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    expected = by_hand(model, batches(7), 1)
    found = gradients(model, batches(7))
    torch.testing.assert_close(found["0.weight"], expected["0.weight"])
    assert found.ties == {"1.weight": "0.weight"}


@pytest.mark.parametrize("pattern", ["0.*", "1.*"])
def test_a_tied_parameter_by_either_name(pattern):
    """Both uses count, whichever name the pattern fits."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[1].weight = model[0].weight
    expected = by_hand(model, batches(7), 1)["0.weight"]
    (found,) = gradients(model, batches(7), pattern=pattern).to_dict().values()
    torch.testing.assert_close(found, expected)


def test_a_parametrized_weight_has_the_gradient_of_what_it_is_made_of():
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    expected, found = by_hand(model, batches(7), 1), gradients(model, batches(7))
    assert "0.parametrizations.weight.original0" in found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("power", [1, 2])
def test_a_batch_without_examples_counts_for_nothing(power):
    model, given = network(), batches(5, 2)
    empty = (given[0][0][:0], given[0][1][:0])
    found, expected = (gradients(model, one, power=power) for one in ([given[0], empty, given[1]], given))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_modes_that_switch_gradients_off():
    model = network()
    with torch.no_grad():
        assert gradients(model, batches(7))["0.weight"].any()
    with torch.inference_mode(), pytest.raises(Error, match="inference_mode"):
        gradients(model, batches(7))


def test_what_is_not_finite_is_an_error():
    def loss(model, batch):
        return model(batch[0]).sum() * float("nan")

    for power in (1, 2):
        with pytest.raises(Error, match=r"0\.weight.*not finite"):
            gradients(network(), batches(7), power=power, loss=loss)


def test_what_the_loss_does_not_use_has_zeros():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    found = gradients(Half().double(), batches(7))
    assert not found["idle.weight"].any()
    assert found["used.weight"].any()


def test_a_sparse_gradient_is_made_dense():
    table = nn.Embedding(4, 2, sparse=True)
    found = gradients(table, [torch.tensor([1, 1, 3])], loss=lambda m, b: m(b).sum())
    torch.testing.assert_close(found["weight"], torch.tensor([0.0, 2, 0, 1])[:, None].expand(4, 2) / 3)


def test_halves_are_summed_in_float64():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    given = [torch.full((1, 1), 1.0, dtype=torch.bfloat16)] * 300
    found = gradients(layer, given, loss=lambda m, b: m(b).sum())["weight"]
    assert found.dtype == torch.float32
    assert float(found) == 1.0


def test_beside_other_statistics_in_one_pass():
    model = network()
    found = collect(model, batches(5, 2), {"g": Gradients(), "s": Gradients(2), "gram": Gram()})
    torch.testing.assert_close(found["g"]["2.bias"], gradients(model, batches(7))["2.bias"])
    assert "0.weight" in found["gram"]


def test_a_language_model_of_mappings():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    model, ids = Tiny(), torch.tensor([[1, 2, 3], [4, 0, 1]])
    functional.cross_entropy(model(ids)[:, :-1].reshape(-1, 5), ids[:, 1:].reshape(-1), reduction="sum").backward()
    found = gradients(model, [{"input_ids": ids}])
    torch.testing.assert_close(found["head.weight"], model.head.weight.grad / 2)


def test_scores_that_prune():
    """What it is for: gradients times weights, as a score."""
    model = network(dtype=torch.float32)
    inputs, labels = data()
    found = gradients(model, [(inputs.float(), labels)])
    score = ws.open(model).select(["0.weight"]).map(lambda w, g: (w * g).abs(), found.select(["0.weight"]))
    pruned = ws.prune.by_score(model, score, 0.5)
    assert int((pruned["0.weight"] == 0).sum()) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"power": 3}, "power is 1"),
        ({"pattern": "none"}, "none"),
        ({"loss": lambda m, b: m(b[0])}, "one number"),
        ({"loss": lambda m, b: 1.0}, "one number, got float"),
        ({"loss": lambda m, b: b[0].sum()}, "depends on none"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(Error, match=said):
        gradients(network(), batches(7), **options)
    with pytest.raises(Error, match="at least one batch"):
        gradients(network(), [])
    with pytest.raises(Error, match="no labels"):
        gradients(network(), [data()[0]])
