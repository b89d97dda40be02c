"""Masks and weights in turns: the implicit gradient against finite differences of the problem that it solves."""

import copy

import pytest
import torch
from torch import nn

from weightsmith import Error, prune
from weightsmith.adapt import fold
from weightsmith.prune.sparse import bilevel, bilevel_step, implicit_gradient


def test_the_implicit_gradient_is_exact_for_a_loss_that_does_not_bend():
    torch.manual_seed(0)
    slope, gamma = torch.randn(12, dtype=torch.float64), 0.7

    def best(mask):
        return -mask * slope / gamma  # the minimum of slope . (mask theta) + gamma / 2 |theta|^2

    def loss(mask):
        return float(slope @ (mask * best(mask)))

    mask = torch.rand(12, dtype=torch.float64)
    found = implicit_gradient(best(mask), mask, slope, gamma)
    for j in range(12):
        step = torch.zeros(12, dtype=torch.float64)
        step[j] = 1e-6
        assert found[j].item() == pytest.approx((loss(mask + step) - loss(mask - step)) / 2e-6, rel=1e-6)


def test_the_implicit_gradient_agrees_with_finite_differences_on_two_linear_layers():
    torch.manual_seed(0)
    x, goal = torch.randn(40, 5, dtype=torch.float64), 3 * torch.randn(40, 3, dtype=torch.float64)
    sizes, gamma = (5 * 4, 4 * 3), 1.0

    def loss(z):
        first, second = z.split(sizes)
        return ((x @ first.view(5, 4) @ second.view(4, 3) - goal) ** 2).mean()

    start = torch.randn(32, dtype=torch.float64) * 0.3

    def best(mask):
        # The lower problem around a trained start: its pull is towards where the weights are held.
        theta = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([theta], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(mask * theta) + gamma / 2 * ((theta - start) ** 2).sum()
            value.backward()
            return value

        optimizer.step(closure)
        return theta.detach()

    mask = torch.rand(32, dtype=torch.float64) * 0.5 + 0.5
    theta = best(mask)
    z = (mask * theta).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    found = implicit_gradient(theta, mask, gradient, gamma)
    differences = torch.zeros(32, dtype=torch.float64)
    for j in range(32):
        step = torch.zeros(32, dtype=torch.float64)
        step[j] = 1e-5
        up, down = (mask + sign * step for sign in (1, -1))
        differences[j] = (loss(up * best(up)) - loss(down * best(down))) / 2e-5
    cosine = torch.cosine_similarity(found, differences, dim=0)
    assert cosine > 0.9
    # Without the weights' answer it is further off, and with the sign of it turned further still.
    plain, turned = theta * gradient, (theta + mask * gradient / gamma) * gradient
    off = [float((one - differences).norm()) for one in (found, plain, turned)]
    assert 1.4 * off[0] < off[1]
    assert 1.4 * off[1] < off[2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


def batch(seed):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(1)


def loss_of(module, data):
    return nn.functional.cross_entropy(module(data[0]), data[1])


def optimizers(model, masks, lr=0.1, upper_lr=0.5):
    scores = [made.score for made in masks.values()]
    ours = {id(score) for score in scores}
    rest = [p for p in model.parameters() if id(p) not in ours]
    return torch.optim.SGD(rest, lr=lr), torch.optim.SGD(scores, lr=upper_lr)


@pytest.mark.parametrize("gamma", [0.05, 1.0, float("inf")])
def test_a_step_is_one_on_the_weights_then_one_on_the_scores(gamma):
    model = network()
    masks = bilevel(model, 0.5)
    reference = copy.deepcopy(model)
    lower, upper = optimizers(model, masks)
    values = bilevel_step(model, loss_of, batch(0), batch(1), lower=lower, upper=upper, gamma=gamma)

    plain = network()
    thetas = [plain[i].weight.detach().clone() for i in (0, 2)]
    kept = [masks_of_half(theta) for theta in thetas]
    scores = [theta.abs() for theta in thetas]
    biases = [plain[i].bias.detach().clone() for i in (0, 2)]

    def forward(zs, bs, data):
        return nn.functional.cross_entropy(torch.relu(data[0] @ zs[0].T + bs[0]) @ zs[1].T + bs[1], data[1])

    zs = [(m * t).requires_grad_() for m, t in zip(kept, thetas, strict=True)]
    bs = [b.requires_grad_() for b in biases]
    before = forward(zs, bs, batch(0))
    gradients = torch.autograd.grad(before, [*zs, *bs])
    thetas = [t - 0.1 * m * g for t, m, g in zip(thetas, kept, gradients[:2], strict=True)]
    bs = [(b - 0.1 * g).detach() for b, g in zip(bs, gradients[2:], strict=True)]
    zs = [(m * t).detach().requires_grad_() for m, t in zip(kept, thetas, strict=True)]
    between = forward(zs, bs, batch(1))
    gradients = torch.autograd.grad(between, zs)
    scores = [
        s - 0.5 * implicit_gradient(t, m, g, gamma) for s, t, m, g in zip(scores, thetas, kept, gradients, strict=True)
    ]
    assert values == pytest.approx((before.item(), between.item()), abs=1e-6)
    for i, name in ((0, "0.weight"), (1, "2.weight")):
        torch.testing.assert_close(model[2 * i].parametrizations.weight.original, thetas[i])
        torch.testing.assert_close(model[2 * i].bias, bs[i])
        torch.testing.assert_close(masks[name].score, scores[i])
    assert not torch.equal(reference[0].weight, model[0].weight)
    assert all(parameter.grad is None for parameter in model.parameters())


def masks_of_half(weight):
    return weight.abs() >= weight.abs().flatten().sort().values[weight.numel() // 2]


@pytest.mark.parametrize("structure", ["element", "row", "column"])
def test_the_sparsity_is_exact_in_every_step_and_masks_move(structure):
    model = network()
    masks = bilevel(model, 0.5, structure=structure)
    if structure == "element":
        assert torch.equal(model[0].weight, prune.magnitude(network(), sparsity=0.5).to_dict()["0.weight"])
    first = {name: made.asked().clone() for name, made in masks.items()}
    lower, upper = optimizers(model, masks, upper_lr=1.0 if structure == "element" else 30.0)
    for step in range(15):
        bilevel_step(model, loss_of, batch(2 * step), batch(2 * step + 1), lower=lower, upper=upper, gamma=10.0)
        for i, (rows, columns) in ((0, (10, 6)), (2, (4, 10))):
            alive = model[i].weight != 0
            if structure == "element":
                assert int(alive.sum()) == rows * columns // 2
            else:
                whole = alive.all(dim=1 if structure == "row" else 0)
                assert torch.equal(whole, alive.any(dim=1 if structure == "row" else 0))
                assert int(whole.sum()) == (rows if structure == "row" else columns) // 2
    assert any(not torch.equal(made.asked(), first[name]) for name, made in masks.items())
    before = model(batch(0)[0])
    fold(model)
    assert torch.equal(model(batch(0)[0]), before)


def test_wrong_optimizers_and_models_are_refused():
    model = network()
    masks = bilevel(model, 0.5)
    lower, upper = optimizers(model, masks)
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    biases = torch.optim.SGD([model[0].bias, model[2].bias], lr=0.1)
    before = copy.deepcopy(model.state_dict())
    for one, other, message in (
        (everything, upper, "the lower optimizer; it has scores"),
        (biases, upper, r"the lower optimizer; it lacks 0\.weight, 2\.weight"),
        (lower, lower, "the upper optimizer"),
        (lower, everything, "the upper optimizer"),
    ):
        with pytest.raises(Error, match=message):
            bilevel_step(model, loss_of, batch(0), batch(1), lower=one, upper=other)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if "extra" not in name)
    for gamma in (0.0, -1.0):
        with pytest.raises(Error, match="gamma must be positive"):
            bilevel_step(model, loss_of, batch(0), batch(1), lower=lower, upper=upper, gamma=gamma)
        with pytest.raises(Error, match="gamma must be positive"):
            implicit_gradient(torch.ones(1), torch.ones(1), torch.ones(1), gamma)
    with pytest.raises(Error, match="needs the masks"):
        bilevel_step(network(), loss_of, batch(0), batch(1), lower=lower, upper=upper)
    with pytest.raises(Error, match="structure is one of"):
        bilevel(network(), structure="filter")
    model[0].parametrizations.weight.original.requires_grad_(False)
    before = model[2].bias.detach().clone()
    with pytest.raises(Error, match=r"0\.weight is frozen"):
        bilevel_step(model, loss_of, batch(0), batch(1), lower=lower, upper=upper)
    assert torch.equal(model[2].bias, before)
    model[0].parametrizations.weight.original.requires_grad_(True)
    with pytest.raises(Error, match=r"says nothing of 0\.weight"):
        bilevel_step(
            model, lambda module, data: module[2].weight.square().sum(), batch(0), batch(1), lower=lower, upper=upper
        )
