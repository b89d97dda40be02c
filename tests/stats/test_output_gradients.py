"""Squared output gradients, and Gram matrices weighted with them, against backward passes of single examples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import Gram, GuidedGram, collect, combine, features, fisher, gram, guided_gram, output_gradients


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(random(n, 3, seed=n), torch.arange(n) % 4) for n in (4, 1, 6)]


def by_hand(model: nn.Module, data: list[tuple[Tensor, Tensor]], at: str, groups: int) -> Tensor:
    """One example at a time: the row of its input, and the gradient of its loss at the layer's output."""
    model = copy.deepcopy(model).eval()
    layer = model.get_submodule(at)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(seen.append)  # what is written over the output later does not matter
        seen.append(given[0].detach())

    handle = layer.register_forward_hook(keep)
    inputs = layer.weight[0].numel()
    total = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
    for batch, labels in data:
        for x, y in zip(batch, labels, strict=True):
            seen.clear()
            functional.cross_entropy(model(x[None]), y[None]).backward()
            rows, slopes = features(layer, seen[0]).double(), seen[1].double()
            slopes = slopes.reshape(-1, len(layer.weight)) if isinstance(layer, nn.Linear) else slopes[0].flatten(1).T
            for row, slope in zip(rows, slopes, strict=True):
                for group, some in enumerate(slope.chunk(groups)):
                    total[group] += sum(float(s) ** 2 for s in some) / len(some) * torch.outer(row, row)
    handle.remove()
    return (total if groups > 1 else total[0]).float()


@pytest.mark.parametrize(("at", "groups"), [("0", 1), ("0", 2), ("0", 6), ("4", 1), ("4", 4)])
def test_the_formula_example_by_example(at: str, groups: int):
    found = guided_gram(network(), batches(), groups=groups, pattern=f"{at}.*")
    assert set(found) == {f"{at}.weight"}
    expected = by_hand(network(), batches(), at, groups)
    torch.testing.assert_close(found[f"{at}.weight"], expected, rtol=1e-4, atol=1e-6)


class Small(nn.Module):
    """Convolutions."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.second = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 2)
            self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        return self.head(self.second(x).sum(dim=(2, 3)) + x.sum(dim=(2, 3)))


def images() -> list[tuple[Tensor, Tensor]]:
    return [(random(n, 1, 6, 5, seed=n), torch.arange(n) % 3) for n in (3, 2)]


@pytest.mark.parametrize(("at", "groups"), [("first", 2), ("second", 1), ("second", 4)])
def test_convolutions(at: str, groups: int):
    found = guided_gram(Small(), images(), groups=groups, pattern=f"{at}.*")
    expected = by_hand(Small(), images(), at, groups)
    torch.testing.assert_close(found[f"{at}.weight"], expected, rtol=1e-4, atol=1e-6)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        return y + x.mul_(0.5)


def test_an_input_that_is_overwritten_is_an_error_and_an_output_may_be():
    data = [(random(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(Error, match=r"second\.weight: its input is overwritten after it was used"):
        guided_gram(Overwriting(), data)
    model = Overwriting()
    found = guided_gram(model, data, pattern="first.*")["first.weight"]
    logits = model(data[0][0])
    slopes = (logits.softmax(dim=1) - functional.one_hot(data[0][1], 4)) @ (model.second.weight + 0.5 * torch.eye(4))
    expected = data[0][0].T @ torch.diag(slopes.square().mean(dim=1)) @ data[0][0]
    torch.testing.assert_close(found, expected.detach())


def test_how_the_data_are_cut_into_batches_makes_no_difference():
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in batches() for i in range(len(x))]
    whole, alone = guided_gram(network(), batches()), guided_gram(network(), singles)
    for name in whole:
        torch.testing.assert_close(whole[name], alone[name], rtol=1e-4, atol=1e-7)


def test_with_a_group_for_each_output_it_is_the_fisher_information_of_that_output():
    found, expected = (
        guided_gram(network(), batches(), groups={"0.*": 6, "*": 4}),
        fisher(network(), batches(), labels="given"),
    )
    for name in found:
        diagonal = found[name].diagonal(dim1=1, dim2=2) / 11
        torch.testing.assert_close(diagonal, expected[name], rtol=1e-4, atol=1e-8)


def test_where_every_output_counts_the_same_it_is_the_gram_matrix():
    model, data = nn.Linear(4, 3), [random(5, 2, 4), random(1, 2, 4)]
    found = guided_gram(model, data, loss=lambda model, batch: model(batch).sum())
    torch.testing.assert_close(found["weight"], gram(model, data)["weight"])


def test_padded_tokens_do_not_count():
    layer, tokens, mask = nn.Linear(2, 2), random(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": tokens, "attention_mask": mask}
    found = guided_gram(layer, [batch], loss=lambda model, batch: model(batch["x"]).square().sum())
    kept = tokens[mask.bool()]
    slopes = 2 * layer(kept).detach()
    expected = (kept * slopes.square().mean(dim=1, keepdim=True)).T @ kept
    torch.testing.assert_close(found["weight"], expected)


def test_large_inputs_are_taken_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch):
    from weightsmith.stats import _taps

    expected = guided_gram(Small(), images(), groups=1)
    monkeypatch.setattr(_taps, "AT_ONCE", 30)
    found = guided_gram(Small(), images(), groups=1)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(frozen: bool, fails: bool):
    model = network()
    model(random(4, 3)).sum().backward()
    model[0].weight.requires_grad_(not frozen)
    model[1].eval()
    before, gradients = copy.deepcopy(model), [p.grad.clone() for p in model.parameters()]
    data, calls = batches(), []
    expected = by_hand(model, data, "0", 1) if not frozen else None

    def loss(model, batch):
        calls.append(1)
        if fails and len(calls) == 2:
            raise ZeroDivisionError
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    random_state = torch.random.get_rng_state()
    with torch.no_grad():  # a graph is made all the same
        try:
            found = guided_gram(model, data, loss=loss)
            if expected is not None:
                torch.testing.assert_close(found["0.weight"], expected, rtol=1e-4, atol=1e-6)
            assert not fails
        except ZeroDivisionError:
            assert fails
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for module, was in zip(model.modules(), before.modules(), strict=True):
        assert module.training == was.training
        assert not module._forward_hooks
    for own, was, gradient in zip(model.parameters(), before.parameters(), gradients, strict=True):
        assert own.requires_grad == was.requires_grad
        assert torch.equal(own, was)
        assert torch.equal(own.grad, gradient)
    for own, was in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(own, was)


def test_a_layer_that_the_loss_does_not_feel_has_none():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.never = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x) + self.never(x[:0]).sum()  # called, with no row

    found = guided_gram(Idle(), [(random(2, 3), torch.tensor([0, 1]))])
    assert set(found) == {"used.weight"}


def test_a_layer_that_is_called_twice_counts_twice():
    layer, inputs = nn.Linear(2, 2), random(3, 2)
    found = guided_gram(layer, [inputs], loss=lambda model, batch: model(batch).sum() + 3 * model(2 * batch).sum())
    torch.testing.assert_close(found["weight"], inputs.T @ inputs * (1 + 9 * 4))


def test_one_pass_with_others_and_shards_that_add_up(tmp_path):
    model, data = network(), batches()
    both = collect(model, data, {"guided": GuidedGram(), "gram": Gram()})
    alone = guided_gram(model, data)
    shards = [guided_gram(model, [batch]) for batch in data]
    shards[0].save(tmp_path / "shard.safetensors")
    added = combine(ws.open(tmp_path / "shard.safetensors"), *shards[1:])
    for name in alone:
        assert torch.equal(both["guided"][name], alone[name])
        assert torch.equal(both["gram"][name], gram(model, data)[name])
        torch.testing.assert_close(added[name], alone[name], rtol=1e-6, atol=1e-9)
    with pytest.raises(Error, match="of one kind, got gram, guided gram"):
        combine(both["guided"], both["gram"])


def test_it_is_asked_of_a_model_in_bfloat16():
    model = network().bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches()]
    found = guided_gram(model, data)["0.weight"]
    assert found.dtype == torch.float32
    expected = guided_gram(network(), batches())["0.weight"]
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_refusals():
    with pytest.raises(Error, match=r"0\.weight: its 6 outputs cannot be cut into 4 groups"):
        guided_gram(network(), batches(), groups=4)
    for wrong in (0, True, 1.5):
        with pytest.raises(Error, match=f"groups of 0.weight is a whole number from 1, got {wrong}"):
            guided_gram(network(), batches(), groups=wrong)
    with pytest.raises(Error, match=r"loss= must return one number, got \[4\]"):
        guided_gram(network(), batches(), loss=lambda model, batch: model(batch[0]).sum(dim=1))
    with pytest.raises(Error, match="must return one number, got float"):
        guided_gram(network(), batches(), loss=lambda model, batch: model(batch[0]).sum().item())
    with pytest.raises(Error, match="depends on the outputs of none of these layers"):
        guided_gram(network(), batches(), loss=lambda model, batch: model(batch[0]).detach().sum())
    with pytest.raises(Error, match="have no labels"):
        guided_gram(network(), [random(4, 3)])
    broken = network()
    with torch.no_grad():
        broken[0].bias[0] = torch.nan
    with pytest.raises(Error, match=r"4\.weight: its inputs, or the gradients of its outputs, in batch 1 are not"):
        guided_gram(broken, batches())


# The gradients alone


@pytest.mark.parametrize("at", ["0", "4"])
def test_squares_of_output_gradients_example_by_example(at: str):
    model, data = network(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = output_gradients(model, data)[f"{at}.weight"]
    # A Gram matrix of each output's own rows, for inputs that are all one, has these on its diagonal.
    layer, total = copy.deepcopy(model).eval().get_submodule(at), torch.zeros(())
    twin = copy.deepcopy(model).eval()
    slopes: list[Tensor] = []
    twin.get_submodule(at).register_forward_hook(lambda m, g, o: o.register_hook(slopes.append) and None)
    for batch, labels in data:
        for x, y in zip(batch, labels, strict=True):
            slopes.clear()
            functional.cross_entropy(twin(x[None]), y[None]).backward()
            total = total + slopes[0].double().square().sum(0)
    torch.testing.assert_close(found, total.float(), rtol=1e-4, atol=1e-7)
    assert found.shape == (len(layer.weight),)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padded_tokens_have_no_part_in_output_gradients():
    layer = nn.Linear(2, 1)
    batch = {"input": torch.ones(1, 3, 2), "attention_mask": torch.tensor([[1, 1, 0]])}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, input: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(input)

    found = output_gradients(Model(), [batch], loss=lambda model, given: 3 * model(**given).sum())
    assert found["layer.weight"].tolist() == [18.0]


def test_output_gradients_that_are_not_finite_are_named():
    with pytest.raises(Error, match=r"weight"):
        output_gradients(nn.Linear(2, 1), [torch.ones(1, 2)], loss=lambda model, batch: model(batch).sum() * torch.inf)
