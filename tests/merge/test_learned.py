"""Learned coefficients and private layers: limits, what is left alone, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge import Tinted, adamerging, tint
from weightsmith.merge._coefficients import Progress
from weightsmith.weights import Weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))


def family() -> tuple[nn.Sequential, list[nn.Sequential], list[list[Tensor]]]:
    """A base, two models a little away from it, and batches of inputs for each."""
    base = network()
    models = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for number, model in enumerate(models):
            for place, parameter in enumerate(model.parameters()):
                parameter += 0.5 * random(*parameter.shape, seed=10 * number + place + 1)
    return base, models, [[random(16, 3, seed=100 + 10 * task + n) for n in range(3)] for task in range(2)]


def same(one: Weights, other: Weights) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def mean_loss(module: nn.Module, merged: Weights, models: list[nn.Sequential], data: list[list[Tensor]]) -> float:
    """Cross-entropy with what each task's model finds likeliest."""
    scratch = copy.deepcopy(module)
    merged.load_into(scratch)
    losses = [
        functional.cross_entropy(scratch(x), m(x).argmax(1)) for m, d in zip(models, data, strict=True) for x in d
    ]
    return float(sum(float(loss.detach()) for loss in losses) / len(losses))


# adamerging


def test_without_a_step_it_is_task_arithmetic():
    base, models, data = family()
    for per in ("model", "layer", "tensor"):
        found = adamerging(models, base, base, data, per=per, steps=0)
        same(found, ws.merge.task_arithmetic(models, base=base, weight=0.3))


@pytest.mark.parametrize("loss", ["entropy", "agreement", "confident"])
def test_the_loss_falls(loss: str):
    base, models, data = family()
    told: list[Progress] = []
    adamerging(models, base, base, data, loss=loss, steps=60, rate=0.02, on_step=told.append)  # type: ignore[arg-type]
    assert [one.number for one in told] == list(range(1, 61))
    first, last = (sum(sum(one.losses) for one in part) for part in (told[:6], told[-6:]))
    assert last < first


def test_more_coefficients_fit_better():
    base, models, data = family()
    options = {"loss": "agreement", "steps": 300, "rate": 0.02, "bounds": (-1.0, 2.0)}
    losses = [
        mean_loss(base, adamerging(models, base, base, data, per=per, **options), models, data)  # type: ignore[arg-type]
        for per in ("model", "layer", "tensor")
    ]
    assert losses[0] > losses[1] > losses[2]
    single = min(
        mean_loss(base, ws.merge.task_arithmetic(models, base=base, weight=c / 10), models, data) for c in range(11)
    )
    assert losses[0] < single + 1e-3


def test_one_task_is_found_again():
    """Agreement with the only model there is leads to it, or beyond it where the bounds let it."""
    base, models, data = family()
    labelled = [[(x, models[0](x).argmax(1)) for x in data[0]]]
    options = {"per": "model", "loss": "labels", "steps": 200, "rate": 0.05}
    found = adamerging(models[:1], base, base, labelled, **options)  # type: ignore[arg-type]
    assert found.lineage.options["weight"] == {"*": [1.0]}
    same(found, ws.open(models[0]))


def test_the_coefficients_are_named_and_make_the_merge():
    base, models, data = family()
    told: list[Progress] = []
    found = adamerging(models, base, base, data, steps=5, rate=0.05, on_step=told.append)
    weight = found.lineage.options["weight"]
    assert found.lineage.method == "merge.adamerging"
    assert list(weight) == list(base.state_dict())
    assert told[-1].weight == weight
    assert weight["0.weight"] != weight["2.weight"]
    same(found, ws.merge.task_arithmetic(models, base=base, weight=weight))
    assert all(len(losses) == 2 for losses in (one.losses for one in told))


def test_a_seed_fixes_the_order_of_batches():
    base, models, data = family()
    one, same_seed, other = (
        adamerging(models, base, base, data, steps=4, rate=0.05, seed=seed).lineage.options for seed in (3, 3, 4)
    )
    assert one == same_seed
    assert one != other


def test_the_module_is_left_alone_and_asked_in_evaluation_mode():
    base, models, data = family()
    module = nn.Sequential(*base, nn.Dropout(0.9))
    state = torch.random.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    found = adamerging(models, base, module, data, steps=3)
    same(found, adamerging(models, base, base, data, steps=3))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_files_are_read_and_the_result_is_streamed(tmp_path):
    base, models, data = family()
    for name, model in {"base": base, "a": models[0], "b": models[1]}.items():
        ws.open(model).cast("bfloat16").save(tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    found = adamerging(paths, tmp_path / "base.safetensors", base, data, steps=3)
    found.save(tmp_path / "out.safetensors")
    written = ws.open(tmp_path / "out.safetensors")
    assert written.spec("0.weight").dtype == torch.bfloat16
    for name in written:
        assert torch.equal(written[name], found[name])
    assert "merge.adamerging(weight=" in str(written.lineage)


def test_each_task_may_be_asked_in_its_own_way():
    """Heads of their own: the merge holds the body alone."""
    base, models, data = family()
    bodies = [ws.open(model).select("0.*") for model in models]
    heads = [model[2] for model in models]
    body = nn.Sequential(base[0], base[1])
    ways = [lambda model, batch, head=head: head(model(batch)) for head in heads]
    found = adamerging(bodies, ws.open(base).select("0.*"), body, data, forward=ways, steps=3, rate=0.05)
    other = adamerging(bodies, ws.open(base).select("0.*"), body, data, forward=ways[::-1], steps=3, rate=0.05)
    assert set(found) == {"0.weight", "0.bias"}
    assert not torch.equal(found["0.weight"], other["0.weight"])


def test_refusals_come_before_anything_is_asked():
    base, models, data = family()

    class Deaf(nn.Module):
        def forward(self, inputs):
            raise AssertionError("asked")

    deaf = Deaf()
    for name, wrong in {
        "adamerging needs at least 1 model, got 0": lambda: adamerging([], base, deaf, data),
        "differ in shape": lambda: adamerging([nn.Linear(3, 8)], nn.Linear(3, 9), deaf, data[:1]),
        "data needs batches for each of the 2 models, got 1": lambda: adamerging(models, base, deaf, data[:1]),
        "initial=2 lies outside of bounds": lambda: adamerging(models, base, base, data, initial=2),
        "loss is a function or one of": lambda: adamerging(models, base, deaf, data, loss="none"),  # type: ignore[arg-type]
        "the module has no": lambda: adamerging(models, base, deaf, data),
        "tint: no tensor fits layer='3": lambda: tint(models, base, base, data, "3.*"),
    }.items():
        with pytest.raises(Error, match=name):
            wrong()


# tint


def test_without_a_step_each_task_has_task_arithmetic_and_a_layer_of_its_own():
    base, models, data = family()
    found = tint(models, base, base, data, "2.*", steps=0)
    assert isinstance(found, Tinted)
    merged = ws.merge.task_arithmetic(models, base=base, weight=0.3)
    same(found.shared, merged)
    for task, model in enumerate(models):
        assert set(found.private[task]) == {"2.weight", "2.bias"}
        same(found.task(task), merged | ws.open(model).select("2.*"))


def test_a_private_layer_fits_better_than_coefficients_alone():
    base, models, data = family()
    options = {"loss": "agreement", "steps": 200, "rate": 0.02}
    merged = adamerging(models, base, base, data, **options)  # type: ignore[arg-type]
    tinted = tint(models, base, base, data, "2.*", **options)  # type: ignore[arg-type]
    alone = mean_loss(base, merged, models, data)
    each = [mean_loss(base, tinted.task(t), models[t : t + 1], data[t : t + 1]) for t in (0, 1)]
    assert sum(each) / 2 < 0.5 * alone
    swapped = [mean_loss(base, tinted.task(1 - t), models[t : t + 1], data[t : t + 1]) for t in (0, 1)]
    assert sum(swapped) > sum(each)


def test_a_private_layer_is_trained_by_its_own_task_only():
    """A task whose loss is flat keeps its layer as it was, though the other task's moves."""
    base, models, data = family()
    flat = [lambda model, batch: 0 * model(batch).sum() + torch.zeros(len(batch), 3), lambda model, batch: model(batch)]
    found = tint(models, base, base, data, "2.*", steps=5, forward=flat)
    same(found.private[0], ws.open(models[0]).select("2.*"))
    assert not torch.allclose(found.private[1]["2.weight"], models[1][2].weight)


def test_everything_may_be_private():
    base, models, data = family()
    found = tint(models, base, base, data, "*", steps=2, rate=1e-4)
    for task, model in enumerate(models):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found.task(task)[name], value, atol=3e-4, rtol=0)


def test_parts_are_saved_and_put_together_again(tmp_path):
    base, models, data = family()
    narrow = [ws.open(model).cast("bfloat16") for model in models]
    found = tint(narrow, ws.open(base).cast("bfloat16"), base, data, "2.*", steps=2)
    assert found.private[0].spec("2.weight").dtype == torch.bfloat16
    found.shared.save(tmp_path / "shared.safetensors")
    for task in (0, 1):
        found.private[task].save(tmp_path / f"{task}.safetensors")
        again = ws.open(tmp_path / "shared.safetensors") | ws.open(tmp_path / f"{task}.safetensors")
        for name, value in found.task(task).items():
            assert torch.equal(again[name], value)
    assert "merge.tint(task=1)" in str(ws.open(tmp_path / "1.safetensors").lineage)


def test_a_tied_tensor_is_private_under_all_its_names_or_none():
    class Tied(nn.Module):
        def __init__(self, size: float):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight
            nn.init.constant_(self.one.weight, size)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.two(self.one(inputs))

    arguments = [Tied(1.0)], Tied(0.5), Tied(0.0), [[torch.ones(2, 2)]]
    with pytest.raises(Error, match=r"one\.weight is tied to a tensor that fits layer='two\.\*'"):
        tint(*arguments, "two.*", steps=1)
    found = tint(*arguments, "*", steps=1)
    assert found.private[0].ties == {"two.weight": "one.weight"}
