"""Rounds of pruning: who begins where, masks that are nested, averages that keep them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.sparse import iterative_magnitude, sparse_soups, swamp


def net(norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(), nn.Linear(12, 4))


def noise(module: nn.Module, seed: int) -> None:
    """A training whose end depends on where it began and on its seed."""
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=ws.solve.generator_for(seed, name))
        parameter.data = 0.5 * parameter.data + drawn


class Seen:
    """A training that writes down what it begins with."""

    def __init__(self):
        self.starts: list[dict[str, torch.Tensor]] = []
        self.ends: list[dict[str, torch.Tensor]] = []
        self.seeds: list[int] = []

    def __call__(self, module: nn.Module, seed: int) -> None:
        self.seeds.append(seed)
        self.starts.append({name: value.clone() for name, value in module.state_dict().items()})
        noise(module, seed)
        self.ends.append({name: value.clone() for name, value in module.state_dict().items()})


MATRICES = ("0.weight", "2.weight")


def by_hand(ends: dict[str, torch.Tensor], mask: dict[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """The largest of what was left, over both matrices."""
    flat = torch.cat([(ends[n].abs() * mask[n]).flatten() for n in MATRICES])
    keep = len(flat) - round(sparsity * len(flat))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(keep).indices] = True
    first, second = chosen.split([72, 48])
    return {"0.weight": first.reshape(12, 6), "2.weight": second.reshape(4, 12)}


@pytest.mark.parametrize("rewind", [True, False])
def test_iterative_magnitude_by_hand(rewind):
    model, train = net(), Seen()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def evaluate(module: nn.Module) -> float:
        return float(module.get_parameter("0.weight").detach().sum())

    ticket = iterative_magnitude(model, train, 0.875, 3, rewind=rewind, evaluate=evaluate)
    mask = {name: torch.ones_like(before[name], dtype=torch.bool) for name in MATRICES}
    shares = [0.0, 0.5, 0.75, 0.875]
    assert len(train.starts) == 4
    for turn, share in enumerate(shares):
        begin = before if rewind or not turn else train.ends[turn - 1]
        mask = by_hand(train.ends[turn - 1], mask, share) if turn else mask
        for name in MATRICES:
            torch.testing.assert_close(train.starts[turn][name], begin[name] * mask[name])
        torch.testing.assert_close(train.starts[turn]["0.bias"], begin["0.bias"])
    for name in MATRICES:
        assert torch.equal(ticket.mask[name], mask[name])
        assert torch.equal(ticket.module.state_dict()[name], train.ends[-1][name] * mask[name])
        torch.testing.assert_close(ticket.start[name], train.starts[-1][name])
    assert [round.sparsity for round in ticket.rounds] == pytest.approx(shares)
    assert ticket.rounds[-1].quality == pytest.approx(evaluate(ticket.module))
    assert len(set(train.seeds)) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ticket.report()["sparsity"] == pytest.approx(0.875)


def test_the_early_moment_is_what_is_rewound_to():
    model, train = net(), Seen()

    def warm_up(module: nn.Module, seed: int) -> None:
        module[0].weight.data.fill_(3.0)  # type: ignore[index]

    ticket = iterative_magnitude(model, train, 0.5, 1, warm_up=warm_up)
    assert train.starts[0]["0.weight"].eq(3).all()
    assert ticket.start["0.weight"][ticket.mask["0.weight"]].eq(3).all()


def test_within_tensors_and_weights_that_became_zero():
    def train(module: nn.Module, seed: int) -> None:
        module[0].weight.data.zero_()  # type: ignore[index]

    ticket = iterative_magnitude(net(), train, 0.75, 2, scope="tensor")
    assert [int(ticket.mask[name].sum()) for name in MATRICES] == [18, 12]
    ticket = iterative_magnitude(net(), train, 0.75, 2, pattern="2.weight")
    assert list(ticket.mask) == ["2.weight"]


def test_masks_are_nested_also_beside_weights_that_became_zero():
    calls = []

    def train(module: nn.Module, seed: int) -> None:
        calls.append(seed)
        weight = module.get_parameter("0.weight")
        weight.data = torch.arange(1.0, 73).reshape(12, 6) if len(calls) == 1 else torch.zeros(12, 6)

    ticket = iterative_magnitude(net(), train, 0.75, 2, pattern="0.weight")
    kept = ticket.mask["0.weight"].flatten()
    assert not kept[:36].any()  # these went first and stay out
    assert int(kept.sum()) == 18


def test_one_particle_is_iterative_magnitude():
    one = swamp(net(), noise, 0.8, 2, particles=1, seed=3)
    alone = iterative_magnitude(net(), noise, 0.8, 2, seed=3)
    for name, value in alone.module.state_dict().items():
        assert torch.equal(one.module.state_dict()[name], value)


def test_swamp_by_hand():
    model, train = net(), Seen()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ticket = swamp(model, train, 0.75, 2, particles=3)
    assert len(set(train.seeds)) == 9
    mask = {name: torch.ones_like(before[name], dtype=torch.bool) for name in MATRICES}
    for turn, share in enumerate((0.0, 0.5, 0.75)):
        if turn:
            ends = train.ends[3 * turn - 3 : 3 * turn]
            mean = {name: torch.stack([end[name] for end in ends]).mean(0) for name in MATRICES}
            mask = by_hand(mean, mask, share)
        for start in train.starts[3 * turn : 3 * turn + 3]:  # the particles begin alike
            assert all(torch.equal(start[name], before[name] * mask[name]) for name in MATRICES)
    last = {name: torch.stack([end[name] for end in train.ends[-3:]]).mean(0) for name in before}
    for name in before:
        expected = last[name] * mask[name] if name in MATRICES else last[name]
        torch.testing.assert_close(ticket.module.state_dict()[name], expected)
    assert ws.prune.sparsity_of(ticket.module) == 0.75


def test_batch_norm_is_estimated_anew_from_the_average():
    inputs = [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) * 3 + 1 for i in range(2)]
    model = net(norm=True)
    ticket = swamp(model, noise, 0.5, 1, particles=2, batches=inputs)
    mean = torch.cat([ticket.module[0](part) for part in inputs]).mean(0)  # type: ignore[index]
    torch.testing.assert_close(ticket.module[1].running_mean, mean)  # type: ignore[index]
    plain = swamp(model, noise, 0.5, 1, particles=2)
    assert torch.equal(plain.module[1].running_mean, torch.zeros(12))  # type: ignore[index]
    with pytest.raises(Error, match="batches are read every round"):
        swamp(model, noise, 0.5, 1, batches=iter(inputs))


def test_sparse_soups_by_hand():
    model, train = net(), Seen()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ticket = sparse_soups(model, train, 0.75, 2, copies=2)
    mask = {name: torch.ones_like(before[name], dtype=torch.bool) for name in MATRICES}
    after = before
    for turn, share in enumerate((0.5, 0.75)):
        mask = by_hand(after, mask, share)
        for start in train.starts[2 * turn : 2 * turn + 2]:
            assert all(torch.equal(start[name], after[name] * mask[name]) for name in MATRICES)
        after = {n: (train.ends[2 * turn][n] + train.ends[2 * turn + 1][n]) / 2 for n in before}
        after |= {name: after[name] * mask[name] for name in MATRICES}
    for name in before:
        torch.testing.assert_close(ticket.module.state_dict()[name], after[name])
    assert [round.sparsity for round in ticket.rounds] == [0.5, 0.75]


def test_a_soup_of_ones_own():
    def best(models):
        return max(models, key=lambda model: float(model["0.weight"].sum()))

    train = Seen()
    ticket = sparse_soups(net(), train, 0.5, 1, copies=3, soup=best)
    sums = [float((end["0.weight"] * ticket.mask["0.weight"]).sum()) for end in train.ends]
    assert float(ticket.module[0].weight.sum()) == pytest.approx(max(sums))  # type: ignore[index]


def test_random_state_and_modes_are_left_alone():
    model = net(norm=True).eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    swamp(model, noise, 0.5, 1, particles=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_with_an_optimizer_the_zeros_stay():
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > 0).long()

    def train(module: nn.Module, seed: int) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(10):
            loss = nn.functional.cross_entropy(module(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    ticket = iterative_magnitude(net(), train, 0.6, 2)
    for name in MATRICES:
        weight = ticket.module.get_parameter(name)
        assert not weight[~ticket.mask[name]].any()
        assert weight[ticket.mask[name]].all()


def never(module: nn.Module, seed: int) -> None:
    pytest.fail("trained before the options were checked")


def test_tied_weights_stay_tied_and_share_a_mask():
    layer = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 2))
    cases: list[tuple[Any, dict[str, Any]]] = [
        (iterative_magnitude, {}),
        (swamp, {"particles": 2}),
        (sparse_soups, {"copies": 2}),
    ]
    for method, options in cases:
        ticket = method(model, noise, 0.5, 2, **options)
        assert set(ticket.mask) == {"0.weight", "3.weight"}
        assert ticket.module[0].weight is ticket.module[2].weight  # type: ignore[index]
        assert not ticket.module.get_parameter("2.weight")[~ticket.mask["0.weight"]].any()
        assert torch.equal(ticket.start["0.weight"], ticket.start["2.weight"])


def test_refusals():
    for method, word in ((iterative_magnitude, "rounds"), (swamp, "rounds"), (sparse_soups, "rounds")):
        for sparsity in (0.0, 1.0, -1.0):
            with pytest.raises(Error, match="end at a sparsity between 0 and 1"):
                method(net(), noise, sparsity, 2)
        with pytest.raises(Error, match=f"{word} must be at least 1, got 0"):
            method(net(), noise, 0.5, 0)
        with pytest.raises(Error, match="scope must be global or tensor"):
            method(net(), noise, 0.5, 1, scope="row")  # type: ignore[arg-type]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"scope": "row"}, "scope must be global or tensor"),
        ({"pattern": "nothing"}, "no float tensor fits"),
        ({"batches": iter([torch.ones(4, 6)])}, "batches are read every round"),
    ]
    for options, words in wrong:  # before the early moment is trained to
        with pytest.raises(Error, match=words):
            swamp(net(), never, 0.5, 1, warm_up=never, **options)
    with pytest.raises(Error, match="none of 120 weights would be left"):
        iterative_magnitude(net(), never, 0.999, 2)
    with pytest.raises(Error, match=r"training left weights of 2.weight that are not finite"):
        iterative_magnitude(net(), lambda made, seed: made.get_parameter("2.weight").data.fill_(float("nan")), 0.5, 1)
    with pytest.raises(Error, match="particles must be at least 1"):
        swamp(net(), noise, 0.5, 1, particles=0)
    with pytest.raises(Error, match="copies must be at least 1"):
        sparse_soups(net(), noise, 0.5, 1, copies=0)
    with pytest.raises(Error, match="no matrix to prune"):
        iterative_magnitude(nn.BatchNorm1d(3), noise, 0.5, 1)
