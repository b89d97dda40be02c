"""The descent on coefficients: against finite differences, PyTorch's Adam, and loops written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._coefficients import (
    Descent,
    agreement,
    asked,
    asked_of,
    check_data,
    check_objective,
    cycled,
    descend,
    entropy,
    forwards,
    likelihood,
    span,
    step,
)
from weightsmith.stats.room import default_forward
from weightsmith.weights import Weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def family(count: int = 2) -> tuple[nn.Sequential, list[nn.Sequential]]:
    return network(), [network(seed) for seed in range(1, count + 1)]


def of(base: nn.Module, models: list[nn.Sequential], per: str = "tensor"):
    return span(base, [ws.open(model) for model in models], ws.open(base), per, "test")  # type: ignore[arg-type]


# What can be mixed


@pytest.mark.parametrize(("per", "groups"), [("model", 1), ("layer", 2), ("tensor", 4)])
def test_a_mixture_is_the_start_and_so_much_of_each_difference(per: str, groups: int):
    base, models = family()
    space = of(base, models, per)
    assert space.groups == groups
    weight = random(groups, 2, seed=9)
    mixed = space.mixed(weight)
    for name, start in base.state_dict().items():
        row = {"model": 0, "layer": 0 if name[0] == "0" else 1, "tensor": list(base.state_dict()).index(name)}[per]
        expected = start.clone()
        for number, model in enumerate(models):
            expected += weight[row, number] * (model.state_dict()[name] - start)
        torch.testing.assert_close(mixed[name], expected)
    for number, model in enumerate(models):
        for name, value in space.single(number).items():
            torch.testing.assert_close(value, model.state_dict()[name])


@pytest.mark.parametrize("per", ["model", "layer", "tensor"])
def test_the_option_gives_the_merge_that_was_tried(per: str):
    base, models = family()
    space = of(base, models, per)
    weight = random(space.groups, 2, seed=9)
    merged = ws.merge.task_arithmetic(models, base=base, weight=space.option(weight))
    for name, value in space.mixed(weight).items():
        torch.testing.assert_close(merged[name], value)


def test_names_that_are_patterns_are_taken_as_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("a[0]", nn.Parameter(torch.zeros(2)))
            self.register_parameter("a0", nn.Parameter(torch.zeros(2)))

    start = Weights.of({"a[0]": torch.zeros(2), "a0": torch.zeros(2)})
    model = Weights.of({"a[0]": torch.ones(2), "a0": torch.ones(2)})
    option = span(Odd(), [model], start, "tensor", "test").option(torch.tensor([[0.25], [0.5]]))
    merged = ws.merge.task_arithmetic([model], base=start, weight=option)
    assert merged["a[0]"].tolist() == [0.25, 0.25]
    assert merged["a0"].tolist() == [0.5, 0.5]


class Tied(nn.Module):
    def __init__(self, seed: int, tied: bool = True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        if tied:
            self.two.weight = self.one.weight
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.two(self.one(inputs)) + self.count


@pytest.mark.parametrize("in_module", [True, False])
@pytest.mark.parametrize("in_files", [True, False])
def test_tied_tensors_have_one_value_and_one_coefficient(in_module: bool, in_files: bool):
    base, model, module = Tied(0), Tied(1), Tied(2, tied=in_module)
    opened = [ws.open(base), ws.open(model)]
    if not in_files:
        opened = [Weights.of({n: v.clone() for n, v in one.items()}) for one in opened]
    space = span(module, opened[1:], opened[0], "tensor", "test")
    assert space.groups == (1 if in_module or in_files else 2)
    weight = torch.full((space.groups, 1), 0.25)
    inputs = torch.ones(1, 2)
    merged = ws.merge.task_arithmetic(opened[1:], base=opened[0], weight=space.option(weight))
    expected = Tied(3, tied=in_module)
    merged.load_into(expected)
    torch.testing.assert_close(space.model(space.mixed(weight))(inputs), expected(inputs))
    assert merged["count"] == 0  # integers come from the base


def test_what_the_models_lack_stays_the_modules():
    base, models = family()
    head = [Weights.of({n: v for n, v in model.state_dict().items() if n[0] == "0"}) for model in [base, *models]]
    space = span(base, head[1:], head[0], "model", "test")
    inputs = random(5, 3)
    found = space.model(space.mixed(torch.tensor([[1.0, 0.0]])))(inputs)
    torch.testing.assert_close(found, base[2](models[0][:2](inputs)))


def test_low_precision_is_mixed_in_float32():
    base, models = network(0, torch.bfloat16), [network(1, torch.bfloat16)]
    assert {value.dtype for value in of(base, models).mixed(torch.zeros(4, 1)).values()} == {torch.float32}


def test_what_does_not_fit_is_refused():
    base, models = family()
    with pytest.raises(Error, match=r"test: the module has no 0\.weight, 0\.bias, 2\.weight, 2\.bias"):
        span(nn.Identity(), [ws.open(models[0])], ws.open(base), "model", "test")
    with pytest.raises(Error, match=r"differ in shape: 0\.weight \[4, 3\] against \[4, 5\]"):
        span(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), [], ws.open(base), "model", "test")
    with pytest.raises(Error, match="per is one of model, layer, tensor; got 'task'"):
        of(base, models, "task")
    with pytest.raises(Error, match="no tensor of floats"):
        span(Tied(0), [], Weights.of({"count": torch.tensor(0)}), "model", "test")


# What is asked


def test_entropy_is_the_mean_of_what_each_row_says():
    logits = random(4, 3)
    expected = 0.0
    for row in logits:
        p = row.exp() / row.exp().sum()
        expected += -float(sum(x * math.log(x) for x in p)) / 4
    assert float(entropy(logits, torch.zeros(4, 2))) == pytest.approx(expected)


def test_agreement_is_cross_entropy_with_what_the_other_finds_likeliest():
    logits, told = random(6, 3), random(6, 3, seed=1)
    losses, sure = [], []
    for row, other in zip(logits, told, strict=True):
        p, q = row.softmax(0), other.softmax(0)
        label = max(range(3), key=lambda c: float(q[c]))
        losses.append(-math.log(float(p[label])))
        agree = max(range(3), key=lambda c: float(p[c])) == label
        sure.append(agree or float(q.max()) >= float(p.max()))
    assert 0 < sum(sure) < 6
    batch = torch.zeros(6, 2)
    assert float(agreement(logits, told, batch)) == pytest.approx(sum(losses) / 6)
    kept = [loss for loss, keep in zip(losses, sure, strict=True) if keep]
    assert float(agreement(logits, told, batch, confident=True)) == pytest.approx(sum(kept) / len(kept))


def test_padding_and_the_last_token_do_not_count():
    batch = {"input_ids": torch.tensor([[1, 2, 0], [2, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    logits = random(2, 3, 3)
    rows = torch.stack([logits[0, 0], logits[1, 0], logits[1, 1]])
    torch.testing.assert_close(entropy(logits, batch), entropy(rows, torch.zeros(3, 1)))
    expected = functional.cross_entropy(rows, torch.tensor([2, 1, 1]))
    torch.testing.assert_close(likelihood(logits, batch), expected)
    other = random(2, 3, 3, seed=1)
    told = torch.stack([other[0, 0], other[1, 0], other[1, 1]])
    torch.testing.assert_close(agreement(logits, other, batch), agreement(rows, told, torch.zeros(3, 1)))


def test_objectives_ask_the_model_and_its_teacher():
    base, models = family()
    space, inputs = of(base, models), random(5, 3)
    labels = torch.tensor([0, 1, 2, 1, 0])
    values = space.mixed(random(4, 2, seed=4))
    logits = space.model(values)(inputs)
    for task in (0, 1):
        found = asked(space, values, inputs, task, "agreement", default_forward)
        torch.testing.assert_close(found, agreement(logits, models[task](inputs), inputs))
    found = asked(space, values, (inputs, labels), 0, "labels", default_forward)
    torch.testing.assert_close(found, functional.cross_entropy(logits, labels))
    total = asked(space, values, inputs, 0, lambda model, batch: model(batch).sum(), default_forward)
    torch.testing.assert_close(total, logits.sum() / 5)
    torch.testing.assert_close(asked_of(base, inputs, "entropy", default_forward), entropy(base(inputs), inputs))
    with pytest.raises(Error, match="loss is a function or one of entropy, agreement, confident, labels"):
        check_objective("surprise", "test")
    with pytest.raises(Error, match="one of entropy, labels; got 'agreement'"):
        check_objective("agreement", "test", taught=False)


def test_ways_to_ask_are_one_or_one_a_task():
    assert forwards(None, 2, "test") == [default_forward] * 2
    assert forwards(len, 2, "test") == [len, len]  # type: ignore[arg-type]
    with pytest.raises(Error, match="one for each of the 2 models; got 1"):
        forwards([default_forward], 2, "test")


# The descent


@pytest.mark.parametrize("objective", ["entropy", "agreement", "confident", "labels"])
def test_gradients_are_those_of_finite_differences(objective: str):
    base, models = family()
    space = of(base, models)
    batch = (random(7, 3), torch.tensor([0, 1, 2, 1, 0, 2, 2]))
    weight = random(4, 2, seed=3) * 0.1 + 0.3

    def loss(at: Tensor) -> Tensor:
        return asked(space, space.mixed(at), batch, 1, objective, default_forward)  # type: ignore[arg-type]

    slope = torch.autograd.functional.jacobian(loss, weight)
    assert slope.abs().max() > 1e-3
    for place in ((0, 0), (1, 1), (3, 0)):
        small = torch.zeros_like(weight)
        small[place] = 1e-5
        difference = (loss(weight + small) - loss(weight - small)) / 2e-5
        assert float(difference) == pytest.approx(float(slope[place]), rel=1e-4, abs=1e-8)


def test_steps_are_those_of_adam():
    goal, data = random(5), [[torch.ones(1)], [torch.ones(1)]]
    values = torch.zeros(5, dtype=torch.float64)

    def loss(values, task: int, batch: Tensor) -> Tensor:
        return (task + 1) * (values["a"] - goal).pow(4).sum()

    found = descend("test", {"a": values}, data, loss, steps=7, rate=0.05, seed=0)["a"]
    expected = nn.Parameter(values.clone())
    optimizer = torch.optim.Adam([expected], lr=0.05)
    for _ in range(7):
        optimizer.zero_grad()
        (1.5 * (expected - goal).pow(4).sum()).backward()  # the mean of both tasks
        optimizer.step()
    torch.testing.assert_close(found, expected.detach())
    assert torch.equal(values, torch.zeros_like(values))


def test_a_slope_is_the_mean_over_tasks():
    loss = lambda values, task, batch: (task + 1) * values["a"].sum()  # noqa: E731
    after, losses = step(Descent({"a": torch.zeros(1)}), [0, 0], loss, 0.1, {})
    torch.testing.assert_close(after.means["a"], torch.full((1,), 0.1 * 1.5))
    assert losses == (0.0, 0.0)


def test_a_step_leaves_the_state_that_went_in():
    state = Descent({"a": torch.ones(2)})
    after, losses = step(state, [torch.ones(1)], lambda values, *_: values["a"].sum(), 0.1, {"a": (0.95, 1.0)})
    assert state.count == 0
    assert not state.means
    assert torch.equal(state.values["a"], torch.ones(2))
    assert after.count == 1
    assert losses == (2.0,)
    torch.testing.assert_close(after.values["a"], torch.full((2,), 0.95))  # 0.9 is out of bounds


def test_a_bound_is_left_again():
    """Values that were held at a bound come back when the slope turns."""
    held = Descent({"a": torch.zeros(1)})
    for number in range(30):
        sign = 1 if number < 5 else -1
        held, _ = step(held, [0], lambda values, *_, s=sign: s * values["a"].sum(), 0.1, {"a": (0.0, 1.0)})
    assert float(held.values["a"]) > 0.5


def test_a_batch_of_which_nothing_counts_moves_nothing():
    state = Descent({"a": torch.ones(2)})
    after, losses = step(state, [0], lambda values, *_: torch.zeros(()), 0.1, {})
    assert torch.equal(after.values["a"], state.values["a"])
    assert losses == (0.0,)


def test_what_is_not_finite_is_refused():
    with pytest.raises(Error, match=r"test: step 1 led to values that are not finite; lower rate=0\.1"):
        descend("test", {"a": torch.ones(1)}, [[0]], lambda v, *_: v["a"].sum() * math.nan, steps=2, rate=0.1, seed=0)
    for steps, rate in ((-1, 0.1), (1, 0.0), (1, math.nan)):
        with pytest.raises(Error, match="test needs steps >= 0 and a rate > 0"):
            descend("test", {}, [], lambda v, *_: v, steps=steps, rate=rate, seed=0)


def test_lists_come_in_a_new_order_every_time_and_loaders_in_theirs():
    stream = cycled(list(range(10)), 0, "data")
    rounds = [[next(stream) for _ in range(10)] for _ in range(3)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    again = cycled(list(range(10)), 0, "data")
    assert [next(again) for _ in range(10)] == rounds[0]
    other = cycled(list(range(10)), 1, "data")
    assert [next(other) for _ in range(10)] != rounds[0]
    loader = torch.utils.data.DataLoader(torch.arange(4).tolist(), batch_size=2)  # type: ignore[arg-type]
    stream = cycled(loader, 0, "data")
    assert [next(stream).tolist() for _ in range(4)] == [[0, 1], [2, 3]] * 2


def test_data_that_cannot_be_read_again_is_refused():
    stream = cycled(iter([1, 2]), 0, "data of task 1")
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(Error, match="data of task 1 ran out of batches"):
        next(stream)
    with pytest.raises(Error, match="ran out"):
        next(cycled([], 0, "data"))
    for wrong in (torch.ones(2), {"x": 1}, (torch.ones(2), torch.ones(2)), 3):
        with pytest.raises(Error, match="is a list or a loader of batches"):
            next(cycled(wrong, 0, "data"))  # type: ignore[arg-type]
    with pytest.raises(Error, match="batches for each of the 2 models, got 1"):
        check_data([[]], 2, "test")
    with pytest.raises(Error, match="got a Tensor"):
        check_data(torch.ones(2, 2), 2, "test")  # type: ignore[arg-type]


def test_the_module_stays_as_it_was():
    base, models = family()
    before = copy.deepcopy(base.state_dict())
    space = of(base, models)
    state = Descent({"weight": torch.full((4, 2), 0.3, dtype=torch.float64)})
    step(state, [random(3, 3)], lambda v, _, batch: space.model(space.mixed(v["weight"]))(batch).sum(), 0.1, {})
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())
