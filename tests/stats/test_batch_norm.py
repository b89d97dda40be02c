"""Batch norm's statistics: by hand, with every example counted once, and a model that is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import batch_norm
from weightsmith.weights import Weights


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            nn.Linear(3, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 4),
            nn.BatchNorm1d(4),
        ]
    return nn.Sequential(*layers)


def batches(*sizes: int) -> list[Tensor]:
    return [2 * normal(size, 3, seed=i) + 1 for i, size in enumerate(sizes)]


def by_hand(inputs: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and variance a channel of what a layer was shown, batch by batch, weighted by the values a channel."""
    channels = inputs[0].shape[1]
    means, variances = [], []
    for channel in range(channels):
        total = sum(shown[:, channel].numel() for shown in inputs)
        mean = variance = 0.0
        for shown in inputs:
            values = [float(value) for value in shown[:, channel].flatten()]
            middle = sum(values) / len(values)
            mean += len(values) / total * middle
            variance += len(values) / total * sum((v - middle) ** 2 for v in values) / (len(values) - 1)
        means.append(mean)
        variances.append(variance)
    return means, variances


LAYERS: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (nn.BatchNorm1d, ()),
    (nn.BatchNorm1d, (5,)),
    (nn.BatchNorm2d, (3, 2)),
    (nn.BatchNorm3d, (2, 1, 3)),
    (nn.SyncBatchNorm, (3, 2)),
]


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_the_formula(kind: type[nn.Module], shape: tuple[int, ...]):
    data = [3 * normal(n, 4, *shape, seed=n) - 1 for n in (6, 6, 2)]
    found = batch_norm(kind(4), data)
    means, variances = by_hand(data)
    assert set(found) == {"running_mean", "running_var", "num_batches_tracked"}
    torch.testing.assert_close(found["running_mean"], torch.tensor(means))
    torch.testing.assert_close(found["running_var"], torch.tensor(variances))
    assert found["num_batches_tracked"].item() == 3
    assert found["num_batches_tracked"].dtype == torch.int64


def test_no_graph_is_kept():
    found = batch_norm(network(), batches(8, 8))
    assert not any(value.requires_grad for value in found.values())
    asked: list[bool] = []
    batch_norm(network(), batches(8), forward=lambda model, batch: asked.append(model(batch).requires_grad))  # type: ignore[arg-type, func-returns-value]
    assert asked == [False]


def test_later_layers_see_what_the_corrected_ones_before_give():
    model, data = network(), batches(8, 8, 5)
    found = batch_norm(model, data)
    shown: list[Tensor] = []
    for batch in data:
        hidden = model[0](batch)
        middle, spread = hidden.mean(0), hidden.var(0, correction=0)
        hidden = (hidden - middle) / (spread + 1e-5).sqrt()
        shown.append(model[4](torch.relu(hidden)).detach())
    means, variances = by_hand(shown)
    torch.testing.assert_close(found["5.running_mean"], torch.tensor(means), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["5.running_var"], torch.tensor(variances), rtol=1e-4, atol=1e-5)


def test_what_was_there_before_does_not_matter():
    """An exact mean, not one step of a moving one."""
    model, data = network(), batches(8, 8)
    plain = batch_norm(model, data)
    for module in (model[1], model[5]):
        module.running_mean.fill_(100)
        module.running_var.fill_(1e4)
        module.num_batches_tracked.fill_(77)
        module.momentum = 0.9
    again = batch_norm(model, data)
    for name in plain:
        assert torch.equal(plain[name], again[name])


def test_a_small_last_batch_counts_for_what_it_holds():
    """A thousand alike and two far off: the mean of batches would be halfway."""
    found = batch_norm(nn.BatchNorm1d(1), [torch.zeros(998, 1), torch.full((2, 1), 1000.0)])
    assert found["running_mean"].item() == pytest.approx(2.0)


def test_the_order_of_batches_does_not_matter():
    model, data = network(), batches(8, 4, 6)
    one, other = batch_norm(model, data), batch_norm(model, data[::-1])
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_laid_over_a_merge():
    models = [network(seed) for seed in (0, 1)]
    merged, data = ws.merge.mean(models), batches(16, 16)
    found = merged | batch_norm(models[0], data, weights=merged)
    assert list(found) == list(merged)
    target = network()
    found.load_into(target)
    loaded = network()
    merged.load_into(loaded)
    expected = batch_norm(loaded, data)
    for name in expected:
        torch.testing.assert_close(target.state_dict()[name], expected[name])
    torch.testing.assert_close(found["0.weight"], merged["0.weight"])


def test_the_network_is_set_right():
    """Outputs of every batch norm layer have mean 0 and variance 1 again, which those of the merge have not."""
    models = [network(seed) for seed in (0, 1)]
    data = batches(200)
    model = network()
    for module in models:
        module.train()
        module(data[0])
    merged = ws.merge.mean(models)

    def spread(weights: Weights) -> Tensor:
        weights.load_into(model)
        model.eval()
        return model(data[0]).detach().var(0)

    right = spread(merged | batch_norm(model, data, weights=merged))
    torch.testing.assert_close(right, torch.ones(4), rtol=0.02, atol=0)
    assert float((spread(merged) - 1).abs().max()) > 0.1


def test_with_weights_the_model_need_not_hold_any():
    model = network()
    with torch.device("meta"):
        hollow = network()
    data = batches(8, 8)
    found, expected = batch_norm(hollow, data, weights=ws.open(model)), batch_norm(model, data)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    assert all(value.is_meta for value in hollow.state_dict().values())


def test_a_plain_state_dict_and_another_dtype_will_do():
    model, data = network(), batches(8)
    narrow = {n: v.bfloat16() if v.is_floating_point() else v for n, v in network(1).state_dict().items()}
    found = batch_norm(model, data, weights=narrow)
    loaded = network()
    Weights.of(narrow).load_into(loaded)
    expected = batch_norm(loaded, data)
    for name in expected:
        assert torch.equal(found[name], expected[name])


class Failing(Exception):
    pass


def failing(model: Callable[..., Any], batch: Tensor) -> Tensor:
    model(batch)
    raise Failing


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool, other: bool):
    model = network(dropout=0.5)
    model.train()
    model[1].eval()
    model[5].momentum = None
    model(batches(8)[0]).sum().backward()
    before = copy.deepcopy(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    weights = ws.merge.mean([network(1), network(2)]) if other else None
    held = {} if weights is None else {name: weights[name].clone() for name in weights}
    generator = torch.random.get_rng_state()
    try:
        batch_norm(model, batches(8, 8), weights=weights, forward=failing if fails else None)
        assert not fails
    except Failing:
        assert fails
    for module, was in zip(model.modules(), before.modules(), strict=True):
        assert module.training == was.training
        assert not module._forward_pre_hooks
        if isinstance(was, nn.BatchNorm1d):
            assert isinstance(module, nn.BatchNorm1d)
            assert module.momentum == was.momentum
            assert module.track_running_stats is True
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    for name, value in held.items():
        assert torch.equal(weights[name], value)  # type: ignore[index]
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_weights_in_memory_are_not_written_to():
    given = {name: value.clone() for name, value in network(1).state_dict().items()}
    before = {name: value.clone() for name, value in given.items()}
    batch_norm(network(), batches(8), weights=given)
    for name, value in before.items():
        assert torch.equal(given[name], value)


def test_dropout_is_off():
    data = batches(8)
    one, other = batch_norm(network(dropout=0.9), data), batch_norm(network(dropout=0.0), data)
    for name in one:
        assert torch.equal(one[name], other[name])


def test_frozen_layers_are_passed_over():
    """Without running statistics there is nothing to estimate; those that a pattern leaves out use what they have."""
    model, data = network(), batches(8)
    model[1] = nn.BatchNorm1d(8, track_running_stats=False)
    assert set(batch_norm(model, data)) == {"5.running_mean", "5.running_var", "5.num_batches_tracked"}
    model = network()
    model[1].running_mean.fill_(3.0)
    found = batch_norm(model, data, pattern="5.*")
    assert set(found) == {"5.running_mean", "5.running_var", "5.num_batches_tracked"}
    hidden = (model[0](data[0]) - 3.0) / (1 + 1e-5) ** 0.5
    means, _ = by_hand([model[4](torch.relu(hidden)).detach()])
    torch.testing.assert_close(found["5.running_mean"], torch.tensor(means), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One layer under two names and called twice; another that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.same = self.norm
        self.unused = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(input=self.norm(x) + 5.0)


def test_a_layer_that_is_called_twice_or_never():
    model, data = Twice(), batches(8, 8)
    found = batch_norm(model, data)
    assert set(found) == {
        f"{n}.{k}" for n in ("norm", "same") for k in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert found["norm.num_batches_tracked"].item() == 4
    means, _ = by_hand([*data, *(torch.full((8, 3), 5.0) for _ in data)])
    torch.testing.assert_close(found["same.running_mean"], torch.tensor(means))
    assert found.ties["same.running_mean"] == "norm.running_mean"
    merged = ws.open(model)
    assert set(merged | batch_norm(model, data, weights=merged)) == set(merged)


def test_bfloat16_is_summed_wide():
    """256 + 1 is 256 in bfloat16: a running sum there would stand still."""
    model = nn.BatchNorm1d(1).bfloat16()
    data = [torch.full((4, 1), 1.0).bfloat16()] * 300
    found = batch_norm(model, data)
    assert found["running_mean"].dtype == torch.bfloat16
    assert found["running_mean"].item() == 1.0
    assert found["num_batches_tracked"].item() == 300


def test_batches_of_every_form():
    data = batches(8, 8)
    plain = batch_norm(network(), data)
    with_labels = batch_norm(network(), [(batch, torch.zeros(8)) for batch in data])
    named = batch_norm(network(), ({"input": batch, "labels": torch.zeros(8)} for batch in data))
    own = batch_norm(network(), [{"x": batch} for batch in data], forward=lambda model, batch: model(batch["x"]))
    for name in plain:
        for other in (with_labels, named, own):
            assert torch.equal(plain[name], other[name])


def test_an_output_without_logits_needs_a_forward_of_ones_own():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x), x

    assert batch_norm(Pair(), batches(8), forward=lambda model, batch: model(batch)[0])


def test_saved_and_opened(tmp_path):
    found = batch_norm(network(), batches(8))
    found.save(tmp_path / "bn.safetensors")
    written = ws.open(tmp_path / "bn.safetensors")
    assert "stats.batch_norm(batches=1)" in str(written.lineage)
    for name in found:
        assert torch.equal(written[name], found[name])


def test_refusals():
    model = network()
    with pytest.raises(Error, match="batch_norm needs at least one batch of data, got none"):
        batch_norm(model, [])
    with pytest.raises(Error, match="the model has no batch norm with running statistics"):
        batch_norm(nn.Linear(2, 2), batches(8))
    with pytest.raises(Error, match=r"no running statistics fit '4\.\*'"):
        batch_norm(model, batches(8), pattern="4.*")
    with pytest.raises(Error, match=r"1\.running_mean is shown a batch of 1 value a channel"):
        batch_norm(model, batches(8, 1))
    with pytest.raises(Error, match=r"do not fit the model: they lack 4\.bias; it has no 4\.bios"):
        batch_norm(model, batches(8), weights=ws.open(model).rename({"4.bias": "4.bios"}))
    with pytest.raises(Error, match=r"do not fit the model: 4\.bias \[5\] into \[4\]"):
        batch_norm(model, batches(8), weights={**model.state_dict(), "4.bias": torch.ones(5)})
