"""Harm by tensor and level: by hand, and against the layer's own outputs."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune.allocation import Curves, gram_curves, measured, output_energy


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)
        )


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(23, 5, generator=generator), torch.randint(3, (23,), generator=generator)
    return list(zip(inputs.split(10), labels.split(10), strict=True))


@pytest.mark.parametrize("error", ["output", "kl", "loss"])
def test_by_hand(error):
    model, levels = net(), (0.25, 0.5, 1.0)
    model(torch.randn(16, 5, generator=torch.Generator().manual_seed(2)))  # statistics that are not 0 and 1
    found = measured(model, iter(data()), levels, error=error)
    inputs, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    whole = copy.deepcopy(model).eval()
    assert found.levels == (0.0, *levels)
    assert found.sizes == {"0.weight": 40, "4.weight": 48, "6.weight": 18}
    for name in found.harms:
        for column, level in enumerate(found.levels):
            other = copy.deepcopy(whole)
            weight = other.get_parameter(name)
            smallest = weight.detach().abs().flatten().argsort()[: round(level * weight.numel())]
            with torch.no_grad():
                weight.view(-1)[smallest] = 0
                before, after = whole(inputs), other(inputs)
            expected = {
                "output": (before - after).square().mean(),
                "kl": (before.softmax(1) * (before.log_softmax(1) - after.log_softmax(1))).sum(1).mean(),
                "loss": functional.cross_entropy(after, labels) - functional.cross_entropy(before, labels),
            }[error]
            assert float(found.harms[name][column]) == pytest.approx(float(expected), abs=1e-6)


def test_the_model_is_left_as_it_was():
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    measured(model, data(), (0.5,))
    with pytest.raises(RuntimeError):
        measured(model, [torch.ones(2, 4)], (0.5,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == objects
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


class Text(nn.Module):
    """A toy language model with tied embeddings."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.body(self.embed(input_ids)).tanh())


def test_texts_leave_out_padding_and_tied_weights_change_everywhere():
    torch.manual_seed(0)
    model = Text()
    ids = torch.randint(7, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    found = measured(model, [{"input_ids": ids, "attention_mask": mask}], (0.5,), error="kl", pattern="*weight")
    other = copy.deepcopy(model)
    pruned = ws.prune.magnitude({"w": model.head.weight.detach()}, 0.5, pattern="*")["w"]
    with torch.no_grad():
        other.embed.weight.copy_(pruned)
        before, after = (m(ids)[:, :-1].log_softmax(-1) for m in (model, other))
    counts = mask[:, 1:].bool()
    expected = (before.exp() * (before - after)).sum(-1)[counts].mean()
    assert list(found.harms) == ["embed.weight", "body.weight"]
    assert float(found.harms["embed.weight"][1]) == pytest.approx(float(expected), rel=1e-4)


def test_gram_curves_are_the_outputs_of_the_layer():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(2, 4, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    inputs = torch.randn(3, 2, 6, 6, generator=generator)
    grams = ws.stats.gram(layer, [inputs])
    for method in (None, partial(ws.prune.wanda, stats=grams)):
        found = gram_curves(layer, (0.3, 0.8), stats=grams, method=method)
        total = gram_curves(layer, (0.3, 0.8), stats=grams, method=method, relative=False)
        for column, level in enumerate((0.3, 0.8), start=1):
            pruned = (method or ws.prune.magnitude)(layer, level)["weight"]
            change = functional.conv2d(inputs, layer.weight - pruned).square().sum()
            whole = layer(inputs).square().sum()
            assert float(total.harms["weight"][column]) == pytest.approx(float(change), rel=1e-4)
            assert float(found.harms["weight"][column]) == pytest.approx(float(change / whole), rel=1e-4)


def test_forms_of_gram_matrices():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(3, 6, generator=generator), torch.randn(9, 6, generator=generator)
    gram = inputs.T @ inputs
    assert output_energy(weight, gram) == pytest.approx(float((inputs @ weight.T).square().sum()), rel=1e-5)
    blocks = torch.stack([gram[:3, :3], gram[3:, 3:]])
    assert output_energy(weight, blocks) == pytest.approx(output_energy(weight, torch.block_diag(*blocks)), rel=1e-5)
    diagonal = gram.diagonal()
    assert output_energy(weight, diagonal) == pytest.approx(output_energy(weight, diagonal.diag()), rel=1e-5)
    assert output_energy(weight.bfloat16(), gram) == pytest.approx(output_energy(weight.bfloat16().float(), gram))


def test_tensors_of_no_elements_do_no_harm():
    assert output_energy(torch.zeros(0, 3), torch.eye(3)) == 0
    assert output_energy(torch.zeros(0, 4), torch.zeros(2, 2, 2)) == 0
    weights = {"a": torch.zeros(0, 2), "b": torch.tensor([[1.0, 3.0]])}
    found = gram_curves(weights, (0.5,), stats={"a": torch.eye(2), "b": torch.eye(2)})
    assert found.harms["a"].tolist() == [0.0, 0.0]
    assert found.harms["b"].tolist() == pytest.approx([0.0, 0.1])


def test_between_levels_and_as_a_report():
    curves = Curves((0.0, 0.5, 1.0), {"a": torch.tensor([0.0, 1.0, 4.0]), "b": torch.tensor([0.0, 2.0, 3.0])}, {"a": 4})
    assert curves.at({"a": 0.75, "b": 0.25}) == 2.5 + 1.0
    assert curves.at({"a": 1.0, "b": 0.0}) == 4.0
    with pytest.raises(Error, match="say nothing of c"):
        curves.at({"c": 0.5})
    with pytest.raises(Error, match=r"reach from 0 to 0.5; got a share of 0.7"):
        Curves((0.0, 0.5), {"a": torch.zeros(2)}, {"a": 4}).at({"a": 0.7})
    found = measured(net(), data(), (0, 0.5)).report()
    assert found["tensor"] == ["0.weight", "4.weight", "6.weight"]
    assert len(found["at 50 %"]) == 3


def test_refusals():
    model = net()
    for levels in ((), (0.5, 0.4), (0.5, 1.2), (-0.1, 0.5), (0.0,), (0.5, 0.5)):
        with pytest.raises(Error, match="levels that rise from 0 to 1"):
            measured(model, data(), levels)
    with pytest.raises(Error, match="at least one batch"):
        measured(model, [], (0.5,))
    with pytest.raises(Error, match="error is one of output, kl, loss"):
        measured(model, data(), (0.5,), error="mse")  # type: ignore[arg-type]
    with pytest.raises(Error, match=r"the method leaves 4.weight"):
        measured(model, data(), (0.5,), method=lambda w, s: ws.prune.magnitude(w, s, pattern=["0.*", "6.*"]))
    with pytest.raises(Error, match=r"not finite without parts of 0.weight"):
        measured(model, [torch.full((4, 5), float("nan"))], (0.5,))
    with pytest.raises(Error, match="Gram matrix of its inputs are not finite"):
        gram_curves({"w": torch.ones(2, 2)}, (0.5,), stats={"w": torch.tensor([1.0, float("nan")])})
    dead = gram_curves({"w": torch.ones(2, 2)}, (0.5,), stats={"w": torch.zeros(2)})
    assert dead.harms["w"].tolist() == [0.0, 0.0]
