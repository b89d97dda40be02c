"""Copies of modules: cut, and with fresh weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.prune.structured import cut_module, reinitialised
from weightsmith.solve import seed_for


def test_a_cut_copy(mlp, random_tensor):
    model, graph = mlp
    made = cut_module(model, graph, {"one": torch.tensor([4, 0])})
    assert torch.equal(made[0].weight, model[0].weight[[4, 0]])
    assert torch.equal(made[2].weight, model[2].weight[:, [4, 0]])
    assert made[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert made(random_tensor(2, 6)).shape == (2, 3)


def test_fresh_weights_are_those_of_their_seed(cnn):
    model, _ = cnn
    state, before = torch.random.get_rng_state(), model[0].weight.detach().clone()
    one, again, other = (reinitialised(model, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].weight, again[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(one[1].running_mean, torch.zeros(6))
    assert torch.equal(one[1].weight, torch.ones(6))
    assert torch.equal(model[0].weight, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(1, "fresh weights"))
        wanted = nn.Conv2d(1, 6, 3, bias=False)
    assert torch.equal(one[0].weight, wanted.weight)


def test_the_start_of_the_model_itself_does_not_come_back():
    def drawn(module: nn.Module) -> None:
        for parameter in module.parameters():
            nn.init.normal_(parameter)

    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Linear(5, 4)
            torch.manual_seed(seed)
            own = nn.Linear(5, 4)
            torch.manual_seed(seed)
            drawn(own)
        for fresh, start in ((reinitialised(model, seed), model), (reinitialised(model, seed, drawn), own)):
            assert not torch.eq(fresh.get_parameter("weight"), start.weight).any()


def test_parts_that_cannot_reset_themselves():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2))

    model = nn.Sequential(nn.Linear(2, 2), Bare())
    with pytest.raises(Error, match=r"reset_parameters draws 1\.gain; .* initialise="):
        reinitialised(model)
    made = reinitialised(model, initialise=lambda module: [nn.init.zeros_(p) for p in module.parameters()])
    assert all((p == 0).all() for p in made.parameters())
