"""One set of weights on several grids: choosing, training them together, and searching widths."""

import copy
import itertools

import pytest
import torch
from torch import nn

from weightsmith import Error
from weightsmith.quantize.training import (
    codes,
    configure,
    divergence,
    elastic,
    elastics,
    evolve,
    fake,
    linear_predictor,
    sandwich,
)

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
BATCH = (X, LABELS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def test_each_configuration_is_what_fake_alone_gives():
    model = network()
    elastic(model, bits=(8, 3, 2), group=(None, 2))
    for bits, group in itertools.product((8, 3, 2), (None, 2)):
        alone = network()
        fake(alone, bits=bits, group=group, step="learned")
        assert configure(model, bits, group=group) == {"0.weight": bits, "2.weight": bits}
        assert torch.equal(model(X), alone(X))
        assert all(one.grid.bits == bits and one.grid.group == group for one in codes(model).values())


def test_only_steps_of_the_chosen_grid_get_gradients():
    model = network()
    made = elastic(model, bits=(8, 2))["0.weight"]
    configure(model, 2)
    model(X).sum().backward()
    grads = [fake.learned["scale"].grad for fake in made.fakes]
    assert grads[0] is None
    assert grads[1].abs().sum() > 0


def test_configure_by_name_keeps_what_is_not_said():
    model = network()
    made = elastic(model, bits=(8, 2), group=(None, 2), symmetric=(True, False))
    configure(model, 8, group=2, symmetric=False)
    configure(model, {"0.*": 2, "*": 8})
    grids = [one.layout.grid for one in made.values()]
    assert [(grid.bits, grid.group, grid.symmetric) for grid in grids] == [(2, 2, False), (8, 2, False)]
    with pytest.raises(Error, match=r"has no grid with \{'bits': 5\}"):
        configure(model, {"0.*": 8, "*": 5})
    assert [one.layout.grid.bits for one in made.values()] == [2, 8]


def test_the_choice_goes_along_in_the_state():
    model, other = network(), network()
    elastic(model, bits=(8, 2)), elastic(other, bits=(8, 2))
    configure(model, 2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    assert [one.chosen for one in elastics(other).values()] == [1, 1]


def test_sandwich_adds_up_the_gradients_of_its_configurations():
    model, reference = network(), network()
    for one in (model, reference):
        elastic(one, bits=(8, 4, 2))
    configure(model, 4)
    generator = torch.Generator().manual_seed(5)
    losses = sandwich(model, BATCH, middle=0, truth=0.25, generator=generator)
    assert all(one.chosen == 1 for one in elastics(model).values())
    configure(reference, 8)
    logits = reference(X)
    first = nn.functional.cross_entropy(logits, LABELS)
    configure(reference, 2)
    small = reference(X)
    second = 0.25 * nn.functional.cross_entropy(small, LABELS) + 0.75 * divergence(logits, small, X)
    (first + second).backward()
    assert losses == pytest.approx([first.item(), second.item()])
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_every_configuration_is_taught_by_the_one_before_it():
    model = network()
    elastic(model, bits=(8, 4, 2))
    losses = sandwich(model, BATCH, middle=2, truth=0.0, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    before, wanted = None, []
    for position in range(4):
        for one in elastics(model).values():
            drawn = int(torch.randint(3, (), generator=draws)) if position in (1, 2) else 0
            one.chosen = (0, drawn, drawn, 2)[position]
        logits = model(X)
        label = nn.functional.cross_entropy(logits, LABELS)
        wanted.append((label if before is None else divergence(before, logits, X)).item())
        before = logits.detach()
    assert losses == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert min(losses) > 0


def test_sandwich_draws_from_its_generator_and_restores_after_an_error():
    model = network()
    elastic(model, bits=(8, 4, 2))
    found = []
    for seed in (0, 0):
        model.zero_grad()
        found.append(sandwich(model, BATCH, middle=2, generator=torch.Generator().manual_seed(seed)))
    assert found[0] == found[1]
    assert len(found[0]) == 4

    def broken(model, batch):
        raise RuntimeError("no")

    configure(model, 4)
    with pytest.raises(RuntimeError):
        sandwich(model, BATCH, forward=broken)
    assert all(one.chosen == 1 for one in elastics(model).values())


def test_trained_together_each_width_works():
    model = network()
    elastic(model, bits=(8, 2))
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=0.02), torch.Generator().manual_seed(0)
    first = None
    for _ in range(150):
        optimizer.zero_grad()
        losses = sandwich(model, BATCH, generator=generator)
        optimizer.step()
        first = first or losses
    for bits in (8, 2):
        configure(copy.deepcopy(model), bits)
        configure(model, bits)
        assert nn.functional.cross_entropy(model(X), LABELS) < 0.6 * first[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evolve_finds_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    names = "abcde"
    sizes = {name: int(torch.randint(1, 20, (), generator=generator)) for name in names}
    worth = {(name, bits): float(torch.rand((), generator=generator)) * bits for name in names for bits in (2, 4, 8)}
    levels = dict.fromkeys(names, (2, 4, 8))
    budget = 4.5 * sum(sizes.values())
    asked = []

    def score(bits):
        assert sum(sizes[name] * bits[name] for name in names) <= budget
        asked.append(tuple(bits.values()))
        return sum(worth[item] for item in bits.items())

    best = -1.0
    for choice in itertools.product((2, 4, 8), repeat=5):
        if sum(sizes[name] * bits for name, bits in zip(names, choice, strict=True)) <= budget:
            best = max(best, sum(worth[item] for item in zip(names, choice, strict=True)))
    found, value = evolve(levels, sizes, budget, score, rounds=15, change=0.3, seed=seed)
    assert value == pytest.approx(best)
    assert sum(worth[item] for item in found.items()) == pytest.approx(value)
    assert len(asked) == len(set(asked))
    assert asked.count((4, 4, 4, 4, 4)) == 1  # one width for all is tried
    again = evolve(levels, sizes, budget, score, rounds=15, change=0.3, seed=seed)
    assert again == (found, value)


def test_widths_that_cannot_fit_are_refused():
    with pytest.raises(Error, match="even the smallest widths"):
        evolve({"a": [2, 4]}, {"a": 10}, 19, lambda bits: 0.0)


def test_the_predictor_ranks_what_it_has_not_seen():
    generator = torch.Generator().manual_seed(0)
    worth = {(name, bits): float(torch.randn((), generator=generator)) for name in "abcd" for bits in (2, 4, 8)}
    every = [dict(zip("abcd", choice, strict=True)) for choice in itertools.product((2, 4, 8), repeat=4)]
    truth = [sum(worth[item] for item in one.items()) for one in every]
    order = torch.randperm(len(every), generator=generator).tolist()
    guess = linear_predictor([every[i] for i in order[:30]], [truth[i] for i in order[:30]], ridge=1e-6)
    for i in order[30:]:
        assert guess(every[i]) == pytest.approx(truth[i], abs=1e-3)
    assert guess({"unknown": 3}) == pytest.approx(sum(truth[i] for i in order[:30]) / 30)
    with pytest.raises(Error, match="do not fit"):
        linear_predictor(every, truth[:3])


def test_what_cannot_be_is_refused():
    model = network()
    with pytest.raises(Error, match="at least one width"):
        elastic(model, bits=())
    with pytest.raises(Error, match="do not fill"):
        elastic(model, group=(None, 5))
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    with pytest.raises(Error, match="no weight of this module has several grids"):
        configure(model, 2)


def test_configure_changes_only_what_is_said():
    model = network()
    made = elastic(model, bits=(8, 2), group=(None, 2), symmetric=(True, False))["0.weight"]

    def now():
        return made.layout.grid.bits, made.layout.grid.group, made.layout.grid.symmetric

    configure(model, 2)
    assert now() == (2, None, True)
    configure(model, group=2)
    assert now() == (2, 2, True)
    configure(model, symmetric=False)
    assert now() == (2, 2, False)
    configure(model)
    assert now() == (2, 2, False)
    configure(model, group=None)
    assert now() == (2, None, False)


def test_a_score_that_is_no_number_is_the_worst():
    found, value = evolve(
        {"a": [2, 4], "b": [2, 4]}, {"a": 1, "b": 1}, 8, lambda bits: float("nan") if bits["b"] == 4 else bits["a"]
    )
    assert (found, value) == ({"a": 4, "b": 2}, 4.0)


def test_settings_out_of_range_are_refused():
    model = network()
    elastic(model)
    for options in ({"truth": 1.1}, {"truth": -0.1}, {"middle": -1}):
        with pytest.raises(Error, match="truth lies in"):
            sandwich(model, BATCH, **options)
    for levels, sizes, options in (({"a": []}, {"a": 1}, {}), ({"a": [2]}, {}, {})):
        with pytest.raises(Error, match="a has no widths or no size"):
            evolve(levels, sizes, 8, lambda bits: 0.0, **options)
    with pytest.raises(Error, match="population"):
        evolve({"a": [2]}, {"a": 1}, 8, lambda bits: 0.0, population=0)
    with pytest.raises(Error, match="ridge must be above 0"):
        linear_predictor([{"a": 2}], [1.0], ridge=0.0)


def test_the_largest_grid_is_the_first_of_its_width_and_the_smallest_the_last():
    made = elastic(network(), bits=(8, 2), group=(None, 2))["0.weight"]
    assert (made.largest, made.smallest) == (0, 3)
    assert (made.fakes[0].grid.group, made.fakes[3].grid.group) == (None, 2)
    assert made.chosen == 0
