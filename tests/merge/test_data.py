"""Merging with data: against slow loops, and against what each method is the exact answer to."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._data import fisher, gradient_matching, regmean


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvatures(*shape: int, seed: int = 5) -> Tensor:
    return random(*shape, seed=seed).square() + 0.01


# fisher


def test_fisher_is_the_mean_weighted_element_by_element():
    models, sure, weight = random(3, 4, 5), curvatures(3, 4, 5), [1.0, 2.0, 0.5]
    expected = torch.empty(4, 5, dtype=torch.float64)
    for i in range(4):
        for j in range(5):
            above = sum(weight[m] * sure[m, i, j] * models[m, i, j] for m in range(3))
            expected[i, j] = above / sum(weight[m] * sure[m, i, j] for m in range(3))
    torch.testing.assert_close(fisher(models, sure, weight=weight), expected)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e20])
def test_equal_fisher_information_gives_the_mean(size: float):
    models = random(3, 7).float()
    torch.testing.assert_close(fisher(models, torch.full((3, 7), size)), models.mean(0))
    torch.testing.assert_close(
        fisher(models, torch.full((3, 7), size), weight=[1, 1, 2]), ws.merge.mean(models, weight=[1, 1, 2])
    )


def test_what_matters_to_one_model_only_is_taken_from_it():
    models, sure = torch.tensor([[1.0, 1.0], [5.0, 5.0]]), torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    assert fisher(models, sure)[0].item() == pytest.approx(1, abs=1e-6)
    assert fisher(models, sure)[1].item() == 3  # to neither: the mean
    assert fisher(models, sure, floor=1e4)[0].item() == 3


def test_fisher_minimises_the_sum_of_quadratic_losses():
    models, sure = random(3, 6), curvatures(3, 6)
    merged = fisher(models, sure).requires_grad_()
    (sure * (merged - models).square()).sum().backward()
    torch.testing.assert_close(merged.grad, torch.zeros(6, dtype=torch.float64))


# gradient_matching


def test_gradient_matching_is_its_formula():
    models, base, known, weight = random(2, 5), random(5, seed=1), curvatures(3, 5), [0.7, 1.5]
    prior = 0.1
    expected = base.clone()
    for j in range(5):
        own = known[2, j] + prior
        joint = own + sum(weight[m] * known[m, j] for m in range(2))
        for m in range(2):
            expected[j] += weight[m] * (own + known[m, j]) / joint * (models[m, j] - base[j])
    torch.testing.assert_close(gradient_matching(models, base, known, weight=weight, prior=prior), expected)


def test_for_quadratic_losses_it_is_the_joint_minimum_and_others_are_not():
    """Each model minimises its own loss and the base's; the merged one should minimise the sum of all."""
    base, optima, known, weight = random(6), random(3, 6, seed=1), curvatures(4, 6), [1.0, 0.5, 2.0]
    tasks, own = known[:3], known[3]
    models = (tasks * optima + own * base) / (tasks + own)
    scale = torch.tensor(weight, dtype=torch.float64)[:, None]
    joint = ((scale * tasks * optima).sum(0) + own * base) / ((scale * tasks).sum(0) + own)
    found = gradient_matching(models, base, known, weight=weight, prior=1e-12)
    torch.testing.assert_close(found, joint)
    assert (fisher(models, tasks, weight=weight) - joint).norm() > 0.1
    assert (base + (scale * (models - base)).sum(0) - joint).norm() > 0.1


def test_without_curvatures_of_the_tasks_it_is_task_arithmetic():
    models, base = random(2, 5), random(5, seed=1)
    known = torch.cat([torch.zeros(2, 5), torch.ones(1, 5)]).double()
    arithmetic = base + 0.3 * (models - base).sum(0)
    torch.testing.assert_close(gradient_matching(models, base, known, weight=0.3), arithmetic)
    torch.testing.assert_close(gradient_matching(models, base, torch.zeros_like(known), weight=0.3), arithmetic)
    torch.testing.assert_close(gradient_matching(models, base, weight=0.3), arithmetic)


def test_without_a_hold_of_the_base_it_is_the_fisher_weighted_mean():
    models, base, known = random(2, 5), random(5, seed=1), curvatures(3, 5)
    known[2] = 0
    found = gradient_matching(models, base, known, weight=1.0, prior=1e-12)
    torch.testing.assert_close(found, fisher(models, known[:2]))


def test_a_task_is_removed_and_where_no_curvature_is_left_the_base_stays():
    models, base = torch.tensor([[1.0, 1.0]]), torch.zeros(2)
    known = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    found = gradient_matching(models, base, known, weight=-1.0, prior=1e-9)
    assert found.tolist() == pytest.approx([-3.0, 0.0])


# regmean


def errors(merged: Tensor, layers: Tensor, inputs: Tensor) -> Tensor:
    """The squared change of outputs, summed over models, each on its own inputs."""
    return sum(((x @ merged.T - x @ layer.T) ** 2).sum() for x, layer in zip(inputs, layers, strict=True))


def test_regmean_minimises_the_error_of_outputs():
    """The least squares solution of all models' outputs stacked, found by another road."""
    layers, inputs = random(3, 4, 5), random(3, 20, 5, seed=1) * random(3, 1, 5, seed=2)
    grams = inputs.mT @ inputs
    found = regmean(layers, grams, alpha=1.0)
    stacked = torch.linalg.lstsq(inputs.flatten(0, 1), (inputs @ layers.mT).flatten(0, 1)).solution.T
    torch.testing.assert_close(found, stacked)
    least = errors(found, layers, inputs)
    assert least < 0.9 * errors(layers.mean(0), layers, inputs)
    for seed in range(5):
        assert least < errors(found + 1e-3 * random(4, 5, seed=seed), layers, inputs)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_alpha_shrinks_the_products_of_different_features(alpha: float):
    layers, inputs, weight = random(2, 3, 4), random(2, 9, 4, seed=1), [0.25, 0.75]
    grams = inputs.mT @ inputs
    above, below = torch.zeros(3, 4).double(), torch.zeros(4, 4).double()
    for i in range(2):
        shrunk = grams[i].clone()
        for a in range(4):
            for b in range(4):
                shrunk[a, b] *= 1.0 if a == b else alpha
        above += weight[i] * layers[i] @ shrunk
        below += weight[i] * shrunk
    torch.testing.assert_close(regmean(layers, grams, weight=weight, alpha=alpha), above @ below.inverse())


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("rows", [2, 30])
def test_one_model_is_itself(rows: int, alpha: float):
    layer, inputs = random(1, 4, 6).float(), random(1, rows, 6, seed=1).float()
    torch.testing.assert_close(regmean(layer, inputs.mT @ inputs, alpha=alpha), layer[0])


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_features_that_no_input_has_keep_the_mean(alpha: float):
    layers, inputs = random(2, 3, 6), random(2, 9, 6, seed=1)
    inputs[:, :, 2] = 0
    found = regmean(layers, inputs.mT @ inputs, alpha=alpha)
    torch.testing.assert_close(found[:, 2], layers.mean(0)[:, 2])
    rest = [0, 1, 3, 4, 5]
    part = regmean(layers[:, :, rest], (inputs.mT @ inputs)[:, rest][:, :, rest], alpha=alpha)
    torch.testing.assert_close(found[:, rest], part)


def test_directions_that_no_input_has_do_not_explode():
    """Fewer rows than features: what is seen is fitted, and what is not stays near the models."""
    layers, inputs = random(2, 3, 8).float(), random(2, 3, 8, seed=1).float()
    found = regmean(layers, inputs.mT @ inputs, alpha=1.0)
    assert float(errors(found, layers, inputs)) == pytest.approx(0, abs=1e-6)  # 6 equations, 8 unknowns
    assert found.abs().max() < 10 * layers.abs().max()


def test_small_features_are_not_taken_for_absent_ones():
    layers, inputs = random(2, 3, 4), random(2, 9, 4, seed=1)
    units = torch.tensor([1e-6, 1.0, 1e3, 1.0], dtype=torch.float64)
    inputs *= units
    found = regmean(layers / units, inputs.mT @ inputs, alpha=1.0)
    plain = inputs / units
    torch.testing.assert_close(found * units, regmean(layers, plain.mT @ plain, alpha=1.0))


def test_a_convolution_is_merged_as_the_layer_that_it_is():
    layers = [nn.Conv2d(2, 3, 3, padding=1) for _ in range(2)]
    images = [random(4, 2, 5, 5, seed=seed).float() for seed in (1, 2)]
    grams = [ws.stats.gram(layer, [x]) for layer, x in zip(layers, images, strict=True)]
    merged = ws.merge.regmean(layers, stats=grams, alpha=1.0)

    def error(weight: Tensor) -> float:
        outputs = [
            nn.functional.conv2d(x, weight - layer.weight, padding=1) for x, layer in zip(images, layers, strict=True)
        ]
        return sum(out.square().sum().item() for out in outputs)

    mean = torch.stack([layer.weight for layer in layers]).mean(0)
    assert error(merged["weight"]) < error(mean)
    for seed in range(3):
        assert error(merged["weight"]) < error(merged["weight"] + 0.01 * random(3, 2, 3, 3, seed=seed).float())
    torch.testing.assert_close(merged["bias"], (layers[0].bias + layers[1].bias).detach() / 2)


# Whole models


def siblings() -> tuple[list[nn.Module], list[Tensor]]:
    models: list[nn.Module] = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    return models, [random(8, 3, seed=seed).float() for seed in (3, 4)]


def test_tensors_without_statistics_get_the_mean_and_others_their_own():
    models, inputs = siblings()
    known = [ws.stats.fisher(model, [x]) for model, x in zip(models, inputs, strict=True)]
    merged, opened = ws.merge.fisher(models, stats=known, weight=[1, 3]), [ws.open(model) for model in models]
    for name in opened[0].names(floating=True):
        stacked = torch.stack([model[name] for model in opened])
        stats = torch.stack([one[name] for one in known]) if name in known[0] else None
        assert (stats is None) == name.startswith("1.running")
        assert torch.equal(merged[name], fisher(stacked, stats, weight=[1, 3]))
    assert not torch.allclose(merged["0.weight"], ws.merge.mean(models, weight=[1, 3])["0.weight"])


def test_options_may_differ_by_tensor_and_the_lineage_names_the_statistics(tmp_path):
    models, inputs = siblings()
    known = [ws.stats.gram(model, [x]) for model, x in zip(models, inputs, strict=True)]
    known[0].save(tmp_path / "inputs-of-one.safetensors")
    known[0] = ws.open(tmp_path / "inputs-of-one.safetensors")
    merged = ws.merge.regmean(models, stats=known, alpha={"0.*": 0.5, "*": 1.0})
    for name, alpha in (("0.weight", 0.5), ("2.weight", 1.0)):
        stacked = torch.stack([ws.open(model)[name] for model in models])
        grams = torch.stack([one[name] for one in known])
        assert torch.equal(merged[name], regmean(stacked, grams, alpha=alpha))
    assert "inputs-of-one" in json.dumps(merged.lineage.record())


def test_statistics_of_the_base_come_last():
    models, inputs = siblings()
    base = siblings()[0][0]
    known = [ws.stats.fisher(model, [x]) for model, x in zip([*models, base], [*inputs, inputs[0]], strict=True)]
    merged = ws.merge.gradient_matching(models, base=base, stats=known)
    name = "0.weight"
    stacked = torch.stack([ws.open(model)[name] for model in models])
    expected = gradient_matching(stacked, ws.open(base)[name], torch.stack([one[name] for one in known]))
    assert torch.equal(merged[name], expected)


def test_a_tied_weight_has_its_statistics_under_any_of_its_names():
    weight = torch.ones(2, 2)
    models = [{"a": weight * i, "b": weight * i} for i in (1.0, 3.0)]
    models = [{**model, "b": model["a"]} for model in models]
    merged = ws.merge.fisher(models, stats=[{"b": weight * 3}, {"b": weight}])
    assert torch.equal(merged["a"], torch.full((2, 2), 1.5))
    assert merged.ties == {"b": "a"}


def test_the_result_has_the_dtype_of_the_models():
    models = random(2, 3, 4)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert fisher(models.to(dtype), curvatures(2, 3, 4)).dtype == dtype
        assert regmean(models.to(dtype), torch.eye(4).expand(2, 4, 4)).dtype == dtype
        assert gradient_matching(models.to(dtype), models[0], curvatures(3, 3, 4)).dtype == dtype


# Refusals


def test_statistics_that_do_not_fit_are_refused_before_any_work():
    w = {"w": torch.ones(2, 3)}
    with pytest.raises(Error, match=r"fisher needs stats=, a list of what weightsmith\.stats\.fisher finds.*got none"):
        ws.merge.fisher([w, w])
    with pytest.raises(Error, match="one for each of the 2 models; got 1"):
        ws.merge.fisher([w, w], stats=[w])
    with pytest.raises(Error, match="2 models, then one for the base; got 2"):
        ws.merge.gradient_matching([w, w], base=w, stats=[w, w])
    with pytest.raises(Error, match="got one dict"):
        ws.merge.fisher([w, w], stats=w)
    with pytest.raises(Error, match="say nothing of any weight; they have other, the models w"):
        ws.merge.fisher([w], stats=[{"other": torch.ones(2)}])
    with pytest.raises(Error, match="must speak of the same weights"):
        ws.merge.fisher([w, w], stats=[w, {**w, "v": torch.ones(1)}])
    with pytest.raises(Error, match=r"stats.gram of w is \[2, 3\], but its weight \[2, 3\] needs \[3, 3\]"):
        ws.merge.regmean([w], stats=[w])
    with pytest.raises(Error, match=r"regmean needs Gram matrices \[1, 3, 3\], got \[1, 2, 2\]"):
        regmean(torch.ones(1, 2, 3), torch.ones(1, 2, 2))
    with pytest.raises(Error, match=r"fisher needs statistics \[2, 3\], got \[1, 3\]"):
        fisher(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(Error, match="not finite"):
        regmean(torch.ones(1, 2, 2), torch.full((1, 2, 2), float("nan")))


@pytest.mark.parametrize("method", [fisher, regmean])
def test_negative_weights_are_refused(method):
    with pytest.raises(Error, match="weights that are not negative"):
        method(torch.ones(2, 3, 3), torch.ones(2, 3, 3), weight=[2, -1])


def test_options_out_of_range_are_refused():
    w = {"w": torch.ones(2, 2)}
    with pytest.raises(Error, match="floor is a positive number, got 0"):
        ws.merge.fisher([w], stats=[w], floor=0)
    with pytest.raises(Error, match="alpha lies between 0 and 1, got 2"):
        ws.merge.regmean([w], stats=[w], alpha=2)
    with pytest.raises(Error, match="prior is a positive number, got -1"):
        ws.merge.gradient_matching([w], base=w, stats=[w, w], prior=-1)
    with pytest.raises(Error, match="no option 'densty'"):
        ws.merge.fisher([w], stats=[w], densty=1)
