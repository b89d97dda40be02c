"""Choosing data by their gradients: against brute force, and where what was trained on is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.inspect.attribution import Selected, matching_pursuit, training_data
from weightsmith.stats import example_gradients


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_choice_is_the_best_next_one():
    vectors, target = normal(12, 5), normal(5, seed=1)
    found, cosines = matching_pursuit(vectors, target, 6)
    chosen: list[int] = []
    for index, cosine in zip(found.tolist(), cosines.tolist(), strict=True):
        left = [i for i in range(12) if i not in chosen]
        after = {i: float(torch.cosine_similarity(vectors[[*chosen, i]].sum(0), target, dim=0)) for i in left}
        assert index == max(after, key=after.__getitem__)
        assert cosine == pytest.approx(after[index])
        chosen.append(index)


def test_several_at_once_are_the_best_by_the_same_rule():
    vectors, target = normal(12, 5), normal(5, seed=1)
    first = torch.cosine_similarity(vectors, target[None]).topk(3).indices
    found, _ = matching_pursuit(vectors, target, 7, batch=3)
    assert torch.equal(found[:3], first)
    assert len(set(found.tolist())) == 7
    assert sorted(matching_pursuit(vectors, target, 12)[0].tolist()) == list(range(12))


def network(seed: int = 0, width: int = 6) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def stepped(model: nn.Module, batch: tuple[Tensor, Tensor], rate: float = 0.1) -> nn.Module:
    made = copy.deepcopy(model)
    loss = nn.functional.cross_entropy(made(batch[0]), batch[1], reduction="sum")
    with torch.no_grad():
        for p, g in zip(made.parameters(), torch.autograd.grad(loss, list(made.parameters())), strict=True):
            p -= rate * g
    return made


def test_one_step_of_training_is_undone():
    """The difference is a sum of four gradients of examples that have little in common: these four are found."""
    model, inputs, labels = network(width=30), 3 * torch.eye(30, dtype=torch.float64), torch.arange(30) % 3
    used = torch.tensor([3, 11, 17, 26])
    other = stepped(model, (inputs[used], labels[used]))
    pool = [(inputs[:20], labels[:20]), (inputs[20:], labels[20:])]
    found = training_data(network(9, width=30), model, other, pool, 4, dim=4096)
    assert sorted(found.indices.tolist()) == used.tolist()
    assert found.cosines[-1] > 0.99
    moved = torch.cat([(q - p).detach().flatten() for p, q in zip(model.parameters(), other.parameters(), strict=True)])
    exact = torch.cosine_similarity(-example_gradients(model, pool), moved[None])
    assert (found.alone - exact).abs().max() < 0.06


def test_lengths_count_only_where_asked():
    """Examples with tiny gradients fill up a plain sum, and are no better than others where all have one length."""
    model, labels = network(width=30), torch.arange(30) % 3
    inputs = 3 * torch.eye(30, dtype=torch.float64)
    used = torch.arange(4)
    other = stepped(model, (inputs[used], labels[used]))

    def loss(m, batch):
        small = torch.where(batch[1] >= 3, 1e-6, 1.0)
        return (small * nn.functional.cross_entropy(m(batch[0]), batch[1] % 3, reduction="none")).sum()

    marked = torch.where(torch.arange(30) >= 15, labels + 3, labels)
    plain, equal = (
        training_data(model, model, other, [(inputs, marked)], 12, dim=4096, equal=e, loss=loss) for e in (False, True)
    )
    assert sorted(plain.indices[:4].tolist()) == sorted(equal.indices[:4].tolist()) == [0, 1, 2, 3]
    assert (plain.indices[4:] >= 15).all()
    assert not (equal.indices[4:] >= 15).all()


def test_the_other_way_round_finds_others():
    model, inputs, labels = network(), normal(30, 6), torch.arange(30) % 3
    used = torch.tensor([3, 11, 17, 26])
    other = stepped(model, (inputs[used], labels[used]))
    back = training_data(model, other, model, [(inputs, labels)], 4, dim=4096)
    assert not set(used.tolist()) & set(back.indices.tolist())


def test_labels_of_the_second_checkpoint_and_points_of_the_line():
    model, inputs, labels = network(), normal(30, 6), torch.arange(30) % 3
    other = network(4)
    said = other(inputs).argmax(1)
    expected = training_data(model, model, other, [(inputs, said)], 5)
    for pool in ([inputs], [(inputs, labels)]):
        found = training_data(model, model, other, pool, 5, labels="second")
        assert torch.equal(found.indices, expected.indices)
    at_both = training_data(model, model, other, [(inputs, labels)], 5, points=(0.0, 1.0), dim=64)
    half = training_data(model, model, other, [(inputs, labels)], 5, points=(0.5,), dim=64)
    start = example_gradients(model, [(inputs, labels)], dim=64)
    end = example_gradients(other, [(inputs, labels)], dim=64)
    assert not torch.allclose(half.alone, at_both.alone)
    names = [name for name, _ in model.named_parameters()]
    from weightsmith.stats import project

    moved = project({n: (other.get_parameter(n) - model.get_parameter(n)).detach()[None].float() for n in names}, 64)
    torch.testing.assert_close(
        at_both.alone, torch.cosine_similarity(-(start + end), moved.double()), rtol=1e-4, atol=1e-5
    )


def test_a_pattern_looks_at_some_layers_only():
    model, inputs, labels = network(), normal(30, 6), torch.arange(30) % 3
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].bias += torch.tensor([1.0, -1.0, 0.0])
    found = training_data(model, model, other, [(inputs, labels)], 5, pattern="2.*")
    assert labels[found.indices[0]] == 0
    assert 1 not in labels[found.indices]
    with pytest.raises(Error, match="equal where the pattern looks"):
        training_data(model, model, other, [(inputs, labels)], 5, pattern="0.*")


def test_the_report_and_the_model():
    model = network().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = training_data(model, network(1), network(2), [(normal(9, 6), torch.arange(9) % 3)], 3)
    assert isinstance(found, Selected)
    report = found.report()
    assert report["chosen"] == 3
    assert report["example"] == found.indices.tolist()
    assert report["best cosine"] == max(report["cosine so far"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_what_it_refuses():
    pool = [(normal(4, 6), torch.arange(4) % 3)]
    with pytest.raises(Error, match="cannot choose 5 of 4 candidates"):
        training_data(network(), network(1), network(2), pool, 5)
    with pytest.raises(Error, match="nothing was trained"):
        training_data(network(), network(1), network(1), pool, 2)
    with pytest.raises(Error, match="at least one of points"):
        training_data(network(), network(1), network(2), pool, 2, points=())
    with pytest.raises(Error, match="fits 'x'"):
        training_data(network(), network(1), network(2), pool, 2, pattern="x")
    with pytest.raises(Error, match=r'labels="second" needs batches'):
        training_data(network(), network(1), network(2), [{"x": normal(2, 6)}], 1, labels="second")
    with pytest.raises(Error, match="all zeros"):
        matching_pursuit(normal(3, 2), torch.zeros(2), 1)
    with pytest.raises(Error, match=r"vectors are \[n, d\]"):
        matching_pursuit(normal(3, 2), torch.zeros(3), 1)
    with pytest.raises(Error, match="not finite"):
        matching_pursuit(normal(3, 2) * torch.nan, torch.ones(2), 1)
