"""Scores of attribution methods where it is known what matters, with models whose answer is written down."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.inspect.attribution import (
    input_dependence_rate,
    input_gradients,
    input_independence_rate,
    insignificant_patch,
    model_contrast_score,
    pasted,
    relative_importance,
    shown,
)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_rates_and_scores_by_hand():
    first, second, mask = uniform(6, 1, 4, 5), uniform(6, 1, 4, 5, seed=1), uniform(6, 1, 4, 5, seed=2) < 0.4
    means = [[float(a[m].mean()) for a, m in zip(side, mask, strict=True)] for side in (first, second)]
    contrast = [a - b for a, b in zip(*means, strict=True)]
    torch.testing.assert_close(model_contrast_score(first, second, mask), torch.tensor(contrast))
    assert input_dependence_rate(first, second, mask) == pytest.approx(sum(c > 0 for c in contrast) / 6)
    near = [abs(c) < 0.2 * a for c, a in zip(contrast, means[0], strict=True)]
    assert 0 < sum(near) < 6
    assert input_independence_rate(first, second, mask, 0.2) == pytest.approx(sum(near) / 6)
    assert input_independence_rate(first, first, mask) == 1.0
    assert input_dependence_rate(first, first, mask) == 0.0


def test_channels_count_in_a_mean_and_empty_masks_do_not():
    wide, mask = uniform(3, 2, 4, 4), torch.ones(3, 1, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(model_contrast_score(wide, 0 * wide, mask), wide.flatten(1).mean(1))
    mask[1] = False
    with pytest.raises(Error, match="a mask is empty"):
        input_dependence_rate(wide, wide, mask)
    with pytest.raises(Error, match=r"masks \[n, 1, h, w\]"):
        input_dependence_rate(wide, wide, mask[:, 0])


def test_shown_scores_lie_between_0_and_1():
    scores = uniform(4, 3, 20, 20) - 0.5
    found = shown(scores)
    assert found.shape == (4, 1, 20, 20)
    assert found.flatten(1).min(1).values.tolist() == [0.0] * 4
    assert (found == 1).flatten(1).sum(1).tolist() == pytest.approx([4.0] * 4)  # 1 % of 400
    torch.testing.assert_close(shown(scores * torch.tensor([1.0, 5, 9, 2])[:, None, None, None]), found)
    assert torch.equal(shown(torch.ones(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))


def test_things_lie_where_the_mask_says():
    things, scenes = uniform(30, 2, 3, 4) + 1, uniform(30, 2, 8, 9)
    pictures, mask = pasted(things, scenes, seed=5)
    for i in range(30):
        assert torch.equal(pictures[i].masked_select(mask[i]).reshape(2, 3, 4), things[i])
        assert torch.equal(pictures[i][:, ~mask[i, 0]], scenes[i][:, ~mask[i, 0]])
    corners = {tuple(one[0].nonzero()[0].tolist()) for one in mask}
    assert len(corners) > 12
    assert max(top for top, _ in corners) <= 5
    with pytest.raises(Error, match="do not fit onto scenes"):
        pasted(scenes, things)


def test_an_insignificant_patch_changes_answers_less_and_stays_near():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, patches = uniform(5, 1, 6, 6), uniform(5, 1, 6, 6, seed=1)
    mask = torch.zeros(5, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 1:4, 2:5] = True
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = insignificant_patch(model, inputs, patches, mask, nearness=1e-3)
    start = torch.where(mask, patches, inputs)
    assert torch.equal(found[~mask], inputs[~mask])
    assert found.min() >= 0
    assert found.max() <= 1
    change = [(model(x) - model(inputs)).norm(dim=1) for x in (start, found)]
    assert (change[1] < 0.3 * change[0]).all()
    near = insignificant_patch(model, inputs, patches, mask, nearness=100.0)
    assert (near - start).norm() < (found - start).norm()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(Error, match="patches"):
        insignificant_patch(model, inputs, patches[:2], mask)


class Bright(nn.Module):
    """Says 1 where pixels above (or below) a half sum to more than a threshold: things are bright, scenes dark."""

    def __init__(self, bright: bool, threshold: float):
        super().__init__()
        self.bright, self.threshold = bright, threshold

    def forward(self, x: Tensor) -> Tensor:
        part = x.where((x > 0.5) == self.bright, 0).flatten(1).sum(1) - self.threshold
        return torch.stack([-part, part], dim=1)


def test_the_report_knows_a_gradient_from_noise():
    count = 60
    named, placed = torch.arange(count) % 2, torch.arange(count) // 2 % 2
    things = 0.6 + 0.3 * named[:, None, None, None] * torch.ones(count, 1, 4, 4)
    scenes = 0.1 + 0.2 * placed[:, None, None, None] * torch.ones(count, 1, 10, 10)
    models = Bright(True, 12.0), Bright(False, 17.0)
    attribute = lambda model, x, y: input_gradients(model, x, target=1)  # noqa: E731
    data = (things, named), (scenes, placed)
    good = relative_importance(attribute, *models, *data)
    assert good["pictures"] == count
    assert good["model contrast"] == pytest.approx(1.0)
    assert good["input dependence"] == 0.0  # equal scores are not less
    generator = torch.Generator().manual_seed(0)
    noise = relative_importance(lambda m, x, y: torch.rand(x.shape, generator=generator), *models, *data)
    assert noise["low"] < 0 < noise["high"]
    assert 0.25 < noise["input dependence"] < 0.75
    blind = relative_importance(lambda m, x, y: x, *models, *data)
    assert blind["model contrast"] == 0.0
    with pytest.raises(Error, match="no picture that all models name rightly"):
        relative_importance(attribute, *models, (things, 1 - named), (scenes, placed))


def test_scores_that_stay_zero_have_not_changed():
    zeros, mask = torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3, dtype=torch.bool)
    assert input_independence_rate(zeros, zeros, mask) == 1.0
    assert input_independence_rate(zeros, zeros + 0.01, mask) == 0.0


def test_narrow_scores_are_averaged_in_float32():
    scores, mask = uniform(2, 1, 30, 30).bfloat16(), torch.ones(2, 1, 30, 30, dtype=torch.bool)
    torch.testing.assert_close(model_contrast_score(scores, 0 * scores, mask), scores.float().flatten(1).mean(1))
    assert shown(scores).dtype == torch.float32


def test_patches_keep_to_the_range_of_the_pictures():
    """Pictures brought to mean 0 hold values below 0, and a patch may have them."""
    things, scenes = (uniform(6, 1, 2, 2) - 2, torch.zeros(6)), (uniform(6, 1, 5, 5) - 3, torch.zeros(6))
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(25, 1)), []

    def attribute(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return x.abs()

    relative_importance(attribute, model, model, things, scenes)
    assert seen[-1].max() < 0


def test_pictures_that_the_patch_renames_do_not_count_for_independence():
    class Turning(nn.Module):
        """Right on what it saw before, and never on what is new, which patched pictures are."""

        def __init__(self):
            super().__init__()
            self.asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += not x.requires_grad
            return torch.stack([x.flatten(1).sum(1) * 0 + float(self.asked < 4), 0 * x.flatten(1).sum(1) + 0.5], dim=1)

    things, scenes = (uniform(6, 1, 2, 2), torch.zeros(6)), (uniform(6, 1, 5, 5), torch.zeros(6))
    found = relative_importance(lambda m, x, y: x, Bright(True, 1e9), Turning(), things, scenes)
    assert found.figures["input independence"] is None
    assert found["pictures"] == 6
