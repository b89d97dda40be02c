"""Parts of a loss change, against integrals done by hand and against the difference of the losses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.inspect.attribution import path_attribution
from weightsmith.inspect.attribution._path import BUFFERS


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.arange(n) % 4) for n in (5, 2)]


def test_a_product_of_two_weights():
    """``L = u v`` from (1, 1) to (3, 2): u's part is int (1 + a) 2 da = 3, v's int (1 + 2 a) da = 2."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.u * self.v * x

    ends = [{"u": torch.tensor(u), "v": torch.tensor(v)} for u, v in ((1.0, 1.0), (3.0, 2.0))]
    found = path_attribution(Product(), *ends, [torch.ones(4, 1)], loss=lambda m, x: m(x).sum(), steps=2)
    assert found["part"] == pytest.approx([3.0, 2.0])
    assert found["distance"] == pytest.approx([2.0, 1.0])
    assert found["share"] == pytest.approx([0.6, 0.4])
    assert (found["loss, first"], found["loss, second"]) == pytest.approx((1.0, 6.0))
    assert found["gap"] == pytest.approx(0, abs=1e-6)


def test_parts_sum_to_the_change_and_the_losses_are_means():
    model, other = network(0), network(1)
    found = path_attribution(network(2), model, other, batches(), steps=24)
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    losses = [nn.functional.cross_entropy(net.eval()(inputs), labels).item() for net in (model, other)]
    assert [found["loss, first"], found["loss, second"]] == pytest.approx(losses)
    assert found["gap"] == pytest.approx(0, abs=1e-7)
    assert sum(found["part"]) == pytest.approx(losses[1] - losses[0], abs=1e-7)
    assert BUFFERS not in found["tensor"]


def test_the_way_back_has_the_other_sign():
    there = path_attribution(network(2), network(0), network(1), batches())
    back = path_attribution(network(2), network(1), network(0), batches())
    assert there["part"] == pytest.approx([-part for part in back["part"]])


def test_running_statistics_are_one_more_player():
    model, other = network(0), network(1)
    other.train()(batches()[0][0] * 3 + 1)
    found = path_attribution(network(2), model, other, batches(), steps=24)
    assert found["tensor"][-1] == BUFFERS
    assert abs(found["part"][-1]) > 1e-3
    assert found["gap"] == pytest.approx(0, abs=1e-4)


def test_a_pattern_sums_up_the_rest():
    whole = path_attribution(network(2), network(0), network(1), batches())
    some = path_attribution(network(2), network(0), network(1), batches(), pattern="3.*")
    assert some["tensor"] == ["3.weight", "3.bias", "(others)"]
    assert sum(some["part"]) == pytest.approx(sum(whole["part"]))


def test_tied_weights_count_once_and_files_do(tmp_path):
    import weightsmith as ws

    class Tied(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    data = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3)]
    one, two = Tied(0), Tied(1)
    ws.open(two).save(tmp_path / "two.safetensors")
    found = path_attribution(Tied(2), one, tmp_path / "two.safetensors", data, steps=24)
    assert found["tensor"] == ["a.weight"]
    assert found["gap"] == pytest.approx(0, abs=1e-5)


def test_nothing_is_changed():
    model, first, second = network(2).train(), network(0), network(1)
    before = [copy.deepcopy(net.state_dict()) for net in (model, first, second)]
    state = torch.get_rng_state()
    path_attribution(model, first, second, batches(), steps=2)
    for net, old in zip((model, first, second), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_checkpoints_and_what_it_refuses():
    found = path_attribution(network(2), network(0), network(0), batches(), steps=2)
    assert found["change"] == 0
    assert found["share"] == [None] * len(found["share"])
    with pytest.raises(Error, match="at least one example"):
        path_attribution(network(2), network(0), network(1), [])
    with pytest.raises(Error, match=r"they lack 0\.weight"):
        path_attribution(network(2), network(0), {"x": torch.ones(1)}, batches())
    with pytest.raises(Error, match="no float parameters"):
        path_attribution(nn.Identity(), {}, {}, batches())
