"""Keeping, removing and training anew, on pictures where it is known what can be learned from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.inspect.attribution import block_pictures, diffroar, input_gradients, keep_ranked, remove_and_retrain


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gradients_one_by_one():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).train()
    before = copy.deepcopy(model.state_dict())
    inputs, labels = normal(7, 4), torch.arange(7) % 3
    found = input_gradients(model, inputs, target=labels, at_once=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    for x, y, slope in zip(inputs, labels, found, strict=True):
        point = x[None].requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(model(point)[0, y], point)[0][0], slope)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_exactly_the_highest_or_lowest_are_kept(share):
    inputs, scores = normal(5, 2, 3, 4) + 10, normal(5, 2, 3, 4, seed=1)
    count = round(share * 24)
    for bottom in (False, True):
        found = keep_ranked(inputs, scores, share, bottom=bottom, fill=-1.0)
        for x, s, kept in zip(inputs.flatten(1), scores.flatten(1), found.flatten(1), strict=True):
            expected = torch.full_like(x, -1.0)
            order = s.argsort(descending=not bottom)[:count]
            expected[order] = x[order]
            assert torch.equal(kept, expected)


def test_top_and_bottom_share_nothing_and_equals_draw_lots():
    inputs = torch.ones(400, 10)
    top, bottom = (keep_ranked(inputs, torch.zeros(400, 10), 0.5, bottom=b) for b in (False, True))
    assert top.sum() == bottom.sum() == 2000
    assert (top.mean(0) - 0.5).abs().max() < 0.1
    assert torch.equal(top, keep_ranked(inputs, torch.zeros(400, 10), 0.5))
    assert not torch.equal(top, keep_ranked(inputs, torch.zeros(400, 10), 0.5, seed=1))
    removed = keep_ranked(inputs, normal(400, 10), 0.7, bottom=True)
    assert torch.equal(removed == 0, keep_ranked(inputs, normal(400, 10), 0.3) == 1)


def test_channels_are_kept_together_and_the_fill_may_be_a_picture():
    inputs, scores = normal(3, 2, 4, 4), normal(3, 1, 4, 4, seed=1)
    fill = torch.full((2, 4, 4), 7.0)
    found = keep_ranked(inputs, scores, 0.25, fill=fill)
    kept = found != 7.0
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert kept.flatten(1).sum(1).tolist() == [8, 8, 8]


def test_blocks_have_their_signal_where_the_mask_says():
    signals = torch.rand(40, 2, 6, 5, generator=torch.Generator().manual_seed(0)) + 1
    pictures, places = block_pictures(signals, null=torch.zeros(2, 6, 5), seed=3)
    assert pictures.shape == (40, 2, 12, 5)
    assert torch.equal(pictures != 0, places.expand_as(pictures))
    for i in range(40):
        above = bool(places[i, 0, 0, 0])
        assert torch.equal(pictures[i, :, :6] if above else pictures[i, :, 6:], signals[i])
    assert 10 < int(places[:, 0, 0, 0].sum()) < 30
    default, _ = block_pictures(signals)
    frames = torch.where(places, torch.nan, block_pictures(signals, seed=3)[0])
    assert default.isfinite().all()
    assert len({tuple(f[~f.isnan()].tolist()) for f in frames}) == 1  # the null block never changes


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Only the first two of eight values say anything."""
    inputs, labels = normal(count, 8, seed=seed), torch.arange(count) % 2
    inputs[:, :2] += 2 * (2 * labels[:, None] - 1)
    return inputs, labels


def fit(inputs: Tensor, labels: Tensor):
    """The nearest class mean."""
    means = torch.stack([inputs[labels == c].mean(0) for c in range(2)])
    return lambda test: -torch.cdist(test, means)


def knowing(inputs: Tensor, labels: Tensor) -> Tensor:
    return torch.arange(8.0, 0, -1).expand_as(inputs)


def test_diffroar_knows_who_knows():
    training, test = data(400, 0), data(400, 1)
    good = diffroar(knowing, training, test, fit, shares=[0.25, 0.5])
    bad = diffroar(lambda x, y: -knowing(x, y), training, test, fit, shares=[0.25, 0.5])
    drawn = diffroar(lambda x, y: normal(*x.shape, seed=9), training, test, fit, shares=[0.25, 0.5])
    assert good["mean"] > 0.4
    assert bad["mean"] == pytest.approx(-good["mean"])
    assert abs(drawn["mean"]) < 0.06
    left = keep_ranked(training[0], knowing(*training), 0.25), keep_ranked(test[0], knowing(*test), 0.25)
    expected = float((fit(left[0], training[1])(left[1]).argmax(1) == test[1]).double().mean())
    assert good["top"][0] == pytest.approx(expected)
    assert good["difference"] == pytest.approx([t - b for t, b in zip(good["top"], good["bottom"], strict=True)])
    assert good["highest"] == max(good["difference"])


def test_removal_falls_fastest_for_who_knows():
    training, test = data(400, 0), data(400, 1)
    found = remove_and_retrain(
        {"knowing": knowing, "not": lambda x, y: -knowing(x, y)}, training, test, fit, shares=[0.25, 0.5]
    )
    assert found["below random, knowing"] > 0.1 > 0 > found["below random, not"]
    assert found["mean, knowing"] == pytest.approx(sum(found["knowing"]) / 2)
    assert found["share removed"] == [0.25, 0.5]
    left = [keep_ranked(x, -knowing(x, y), 0.75) for x, y in (training, test)]
    expected = float((fit(left[0], training[1])(left[1]).argmax(1) == test[1]).double().mean())
    assert found["knowing"][0] == pytest.approx(expected)


def test_classes_or_logits():
    training, test = data(60, 0), data(60, 1)

    def classes(inputs: Tensor, labels: Tensor):
        predict = fit(inputs, labels)
        return lambda test: predict(test).argmax(1)

    assert diffroar(knowing, training, test, classes)["mean"] == diffroar(knowing, training, test, fit)["mean"]


def test_what_it_refuses():
    inputs = normal(3, 4)
    with pytest.raises(Error, match=r"scores \[3, 5\] do not fit inputs \[3, 4\]"):
        keep_ranked(inputs, normal(3, 5), 0.5)
    with pytest.raises(Error, match=r"share lies in \[0, 1\], got 1.5"):
        keep_ranked(inputs, inputs, 1.5)
    with pytest.raises(Error, match="not finite"):
        keep_ranked(inputs, inputs * torch.nan, 0.5)
    with pytest.raises(Error, match="at least one of shares"):
        diffroar(knowing, data(4, 0), data(4, 1), fit, shares=[])
    with pytest.raises(Error, match="4 inputs and 3 labels"):
        remove_and_retrain({}, (data(4, 0)[0], torch.zeros(3)), data(4, 1), fit)
    with pytest.raises(Error, match=r"null \[1, 2, 3\] does not fit"):
        block_pictures(normal(2, 1, 4, 4), null=torch.ones(1, 2, 3))
    with pytest.raises(Error, match="signals are"):
        block_pictures(normal(2, 4, 4))
    with pytest.raises(Error, match="does not depend on the inputs"):
        input_gradients(nn.Linear(4, 2), inputs, target=lambda o: o[:, 0].detach())
    with pytest.raises(Error, match="floats"):
        input_gradients(nn.Linear(4, 2), torch.ones(2, 4, dtype=torch.long))


def test_what_is_wrong_shows_before_anything_is_trained():
    training, test = data(8, 0), data(8, 1)

    def never(inputs: Tensor, labels: Tensor):
        raise AssertionError("trained")

    late = lambda x, y: torch.cat([knowing(x, y)[:-1], torch.full((1, 8), torch.nan)])  # noqa: E731
    with pytest.raises(Error, match="not finite"):
        diffroar(late, training, test, never)
    with pytest.raises(Error, match="do not fit"):
        diffroar(lambda x, y: knowing(x, y)[:3], training, test, never)
    with pytest.raises(Error, match=r"share lies in \[0, 1\], got 2"):
        remove_and_retrain({"knowing": knowing}, training, test, never, shares=[0.5, 2])
    with pytest.raises(Error, match="adds the attribution 'random' by itself"):
        remove_and_retrain({"random": knowing}, training, test, never)
    with pytest.raises(Error, match=r"each of 3 examples is \[3\], got \[4\]"):
        input_gradients(nn.Linear(4, 2), normal(3, 4), target=torch.zeros(4, dtype=torch.long))
    with pytest.raises(Error, match="at_once is at least 1"):
        input_gradients(nn.Linear(4, 2), normal(3, 4), target=0, at_once=0)
