"""Stand-ins for parameters: apart or tied, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.prune._autograd import called_loss, free_parameters, gradients, scored_names, slopes_of_examples


def small() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.5), nn.Linear(3, 3, bias=False))


def total(model, x):
    return model(x).sum()


def test_stand_ins_are_differentiated_and_the_mode_comes_back():
    model = small().train()
    with free_parameters(model, ["0.weight"]) as given:
        assert not model.training
        assert given["0.weight"].requires_grad
        loss = called_loss(model, given, torch.ones(2, 3), total)
        found = gradients(model, given, torch.ones(2, 3), total)
        assert torch.equal(torch.autograd.grad(loss, given["0.weight"])[0], found["0.weight"])
    assert model.training
    assert model[0].weight.grad is None


def test_tied_parameters_are_apart_or_together():
    model = small().eval()
    model[2].weight = model[0].weight
    inputs = torch.ones(1, 3)
    total(model, inputs).backward()
    with free_parameters(model, ["0.weight"]) as given:
        (together,) = torch.autograd.grad(called_loss(model, given, inputs, total, tied=True), given["0.weight"])
        apart = gradients(model, given, inputs, total)["0.weight"]
    torch.testing.assert_close(together, model[0].weight.grad)
    assert not torch.allclose(apart, together)


def test_gradients_of_examples_come_a_few_at_a_time():
    model = small().eval()
    batches = [torch.arange(15.0).reshape(5, 3), torch.ones(2, 3)]
    found = list(slopes_of_examples(model, batches, ["2.weight"], 2, total))
    assert [len(part) for part in found] == [2, 2, 1, 2]
    expected = [torch.autograd.grad(total(model, x[None]), model[2].weight)[0] for x in torch.cat(batches)]
    torch.testing.assert_close(torch.cat(found), torch.stack(expected).flatten(1))
    with pytest.raises(Error, match="at_once is at least 1, got 0"):
        next(slopes_of_examples(model, batches, ["2.weight"], 0, total))


def test_chance_is_what_it_was():
    """Also where asking a model draws numbers."""
    model, state = small(), torch.random.get_rng_state()
    with free_parameters(model, ["0.weight"]) as given:
        called_loss(model, given, torch.ones(2, 3), lambda model, x: (model(x) * torch.rand(2, 3)).sum())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_names_that_are_scored():
    model = small()
    assert scored_names(model, None) == ["0.weight", "2.weight"]
    assert scored_names(model, "2*") == ["2.weight"]
    model.register_buffer("table", torch.ones(2, 2))
    assert scored_names(model, None) == ["0.weight", "2.weight"]
    with pytest.raises(Error, match="table is no parameter"):
        scored_names(model, "table")


def test_refusals():
    model = small()
    with pytest.raises(Error, match="no parameter '9"), free_parameters(model, ["9.weight"]):
        pass
    with free_parameters(model, ["0.weight"]) as given, pytest.raises(Error, match="one number"):
        called_loss(model, given, torch.ones(2, 3), lambda model, x: model(x))
