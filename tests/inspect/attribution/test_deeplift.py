"""DeepLIFT, against multipliers by hand, gradients where there is nothing to rescale, and completeness."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.attribution import deeplift, unit_importance


def seeded(make, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    ).double()


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Residual(nn.Module):
    """Modules and plain functions, in place and not, pools that overlap, a sum around a block."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)
        self.last, self.head = nn.AdaptiveMaxPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = x + functional.gelu(self.second(x)) * 0.5
        x = functional.relu(self.pool(x) - 0.1)
        return self.head(self.last(x).flatten(1))


def test_multipliers_by_hand():
    model, inputs, base = mlp(), data(5, 4), data(5, 4).flip(0) * 0.3
    found = deeplift(model, inputs, target=1, baselines=base)
    a, b, c = model[0], model[2], model[4]
    for i in range(5):
        z, z0 = a(inputs[i]), a(base[i])
        first = (z.relu() - z0.relu()) / (z - z0)
        u, u0 = b(z.relu()), b(z0.relu())
        second = (u.tanh() - u0.tanh()) / (u - u0)
        multiplier = ((c.weight[1] * second) @ b.weight * first) @ a.weight
        torch.testing.assert_close(found.values[i], ((inputs[i] - base[i]) * multiplier).detach())


def test_it_is_complete_on_everything_it_knows():
    model, inputs = seeded(Residual).double(), data(6, 2, 9, 9)
    model.train()(data(8, 2, 9, 9) * 2)
    base = data(6, 2, 9, 9).roll(1, 0)
    plain = model.eval()(inputs) - model(base)
    for target in range(3):
        found = deeplift(model, inputs, target=target, baselines=base)
        torch.testing.assert_close(found.change, plain[:, target].detach())
        assert found.gap.abs().max() < 1e-12
        for layer in ("first", "norm", "relu", "pool", "second"):
            part = deeplift(model, inputs, target=target, baselines=base, layer=layer)
            if layer != "second":  # a block beside which the sum goes on does not carry all
                assert part.gap.abs().max() < 1e-12
            assert part.values.shape[:2] == (6, 4)
    assert deeplift(model.float(), inputs.float(), target=0).gap.abs().max() < 1e-5


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_max_pool_gives_a_rise_to_the_new_place_and_a_fall_to_the_old(axes):
    pool = getattr(nn, f"MaxPool{axes}d")(2)
    model = nn.Sequential(pool, nn.Flatten())
    shape = (1, 1, *[1] * (axes - 1), 2)
    if axes > 1:
        pool.kernel_size = (*[1] * (axes - 1), 2)
        pool.stride = pool.kernel_size
    base, up, down = (torch.tensor(v).reshape(shape) for v in ([1.0, 2.0], [5.0, 2.0], [1.0, 0.0]))
    assert deeplift(model, up, baselines=base).values.flatten().tolist() == [3.0, 0.0]
    assert deeplift(model, down, baselines=base).values.flatten().tolist() == [0.0, -1.0]
    assert deeplift(model, base, baselines=base).values.abs().max() == 0


def test_a_dead_unit_has_a_part_where_its_gradient_is_zero():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
        model[0].bias.fill_(1.0)
    inputs = torch.tensor([[3.0]], requires_grad=True)
    assert torch.autograd.grad(model(inputs).sum(), inputs)[0].item() == 0
    assert deeplift(model, inputs.detach()).values.item() == pytest.approx(-1.0)


def test_without_a_difference_it_is_the_gradient():
    """Units that do not change take their derivative: here a linear network, and one at its reference."""
    linear = nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(6, 1)).double()
    inputs = data(3, 4)
    torch.testing.assert_close(deeplift(linear, inputs).values, inputs * (linear[2].weight @ linear[0].weight).detach())
    model, point = mlp(), inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    step = data(3, 4) * 1e-6
    found = deeplift(model, inputs + step, baselines=inputs, target=0).values
    torch.testing.assert_close(found, step * slope, rtol=1e-3, atol=1e-12)


def test_unit_importance_is_the_mean_size_over_positions_summed():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()
    inputs, labels = data(7, 1, 5, 5), torch.arange(7) % 4
    report = unit_importance(model, [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])], ["0", "1"])
    for layer in ("0", "1"):
        parts = deeplift(model, inputs, target=labels, layer=layer).values.flatten(2).sum(2)
        rows = [row for row in report.rows() if row["layer"] == layer]
        assert [row["importance"] for row in rows] == pytest.approx(parts.abs().mean(0).tolist())
        assert [row["mean"] for row in rows] == pytest.approx(parts.mean(0).tolist())
    # What a rectified unit adds is its weight times how much it is more than at the reference.
    grown = (model[1](model[0](inputs)) - model[1](model[0](torch.zeros(1, 1, 5, 5).double()))).flatten(1)
    weighed = (grown * model[3].weight[labels]).reshape(7, 3, 9).sum(2).detach()
    torch.testing.assert_close(torch.tensor(report["importance"][3:]), weighed.abs().mean(0).float(), check_dtype=False)


def test_the_model_is_left_as_it_was():
    model = seeded(Residual).train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    inputs = data(2, 2, 9, 9).float()
    kept = inputs.clone()
    deeplift(model, inputs, target=0, layer="pool")
    assert torch.equal(inputs, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x.roll(1, 1)).sum(1)


class Step(nn.Module):
    """A layer and any step."""

    def __init__(self, step):
        super().__init__()
        self.layer, self.step = seeded(lambda: nn.Linear(4, 4)).double(), step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.layer(x))


def rectified_and_used_again(z: Tensor) -> Tensor:
    return functional.relu(z, inplace=True) + 2 * z


def changed_after_use(z: Tensor) -> Tensor:
    y = torch.tanh(z)
    z += 1
    return 2 * y + z.relu_()


def set_to_zero(z: Tensor) -> Tensor:
    y = z.sigmoid()
    z[:, 0] = 0
    return y + z.mul_(2)


def torch_pool(z: Tensor) -> Tensor:
    return torch.max_pool2d(z[:, None, None], (1, 2), stride=1).flatten(1)


def method_and_used_again(z: Tensor) -> Tensor:
    return z.relu_() * 3 + z + torch.zeros_like(z)


@pytest.mark.parametrize(
    "step", [method_and_used_again, rectified_and_used_again, changed_after_use, set_to_zero, torch_pool]
)
def test_steps_in_place_do_to_the_model_what_they_always_do(step):
    model, inputs, base = Step(step), data(5, 4), torch.full((4,), -0.3, dtype=torch.float64)
    with torch.no_grad():
        change = model(inputs) - model(base[None])
    found = deeplift(model, inputs, target=0, baselines=base)
    torch.testing.assert_close(found.change, change[:, 0])
    assert found.gap.abs().max() < 1e-12


def test_a_model_that_changes_its_inputs_in_place():
    inputs = data(3, 4)
    found = deeplift(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 1).double()), inputs)
    assert found.gap.abs().max() < 1e-12
    assert torch.equal(inputs, data(3, 4))


def test_a_module_that_is_used_twice():
    layer, act = seeded(lambda: nn.Linear(4, 4)).double(), nn.Tanh()
    model, inputs = nn.Sequential(layer, act, layer, act), data(5, 4)
    found = deeplift(model, inputs, target=0)
    torch.testing.assert_close(found.change, (model(inputs) - model(torch.zeros_like(inputs)))[:, 0].detach())
    assert found.gap.abs().max() < 1e-12
    with pytest.raises(Error, match="layer '0' was called 2 times"):
        deeplift(model, inputs, target=0, layer="0")


def test_hardly_any_change_far_from_zero_is_as_complete():
    """Where rounding spoils secants, on a curve: the slope half-way, not that at the end."""
    inputs = torch.full((1, 1), 8.0)
    found = deeplift(nn.Sigmoid(), inputs, baselines=inputs * (1 + 3e-4))
    slope = (torch.sigmoid(inputs.double()) - torch.sigmoid(inputs.double() * (1 + 3e-4))) / (-3e-4 * inputs.double())
    assert float(found.values / (inputs - inputs * (1 + 3e-4))) == pytest.approx(float(slope), rel=1e-4)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, *slopes):
        return slopes[0] * 3 * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda z: z * (z > 0), "no rule for (gt|__gt__)"),
        (lambda z: z.relu() - z.detach(), "no rule for detach"),
        (lambda z: z.relu() - z.data, "no rule for __get__"),
        (lambda z: torch.ones(4) / (z + 9), "no rule for (div|__truediv__)"),
        (lambda z: torch.div(1, z + 9), "no rule for div"),
        (lambda z: torch.div(z, 0.3, rounding_mode="floor"), "no rule for div"),
        (lambda z: functional.linear(z, z), "no rule for linear"),
        (lambda z: functional.dropout1d(z[..., None])[..., 0], "dropout1d works as in training"),
        (lambda z: functional.alpha_dropout(z, training=True), "alpha_dropout works as in training"),
        (lambda z: functional.rrelu(z, training=True), "rrelu works as in training"),
        (lambda z: Cube.apply(z), "miss the change of the output"),
        (lambda z: z - z.mean(0), "miss the change of the output"),
    ],
)
def test_what_would_be_incomplete_is_refused(step, message):
    with pytest.raises(Error, match=message):
        deeplift(Step(step), data(5, 4), target=0, baselines=-0.3)


def test_steps_of_the_target_count_as_the_models():
    model, inputs = mlp(), data(5, 4)
    assert deeplift(model, inputs, target=lambda o: torch.sigmoid(o[:, 0] - o[:, 1])).gap.abs().max() < 1e-12
    with pytest.raises(Error, match="no rule for softmax"):
        deeplift(model, inputs, target=lambda o: o.softmax(1)[:, 0])


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).sum(1) if x.sum().item() > 0 else torch.tanh(x).sum(1)


def test_what_it_refuses_is_named_with_its_module():
    inputs = data(2, 4).float()
    for inner, word in ((nn.LayerNorm(4), "layer_norm"), (nn.Softmax(1), "softmax"), (Product(), "mul|__mul__")):
        net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(inner))
        with pytest.raises(Error, match=rf"no rule for ({word}) in module '1.0'"):
            deeplift(net, inputs, target=lambda o: o.reshape(2, -1)[:, 0])
        assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(Error, match="batch_norm in module '0' works as in training"):
        deeplift(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), inputs, target=0)
    with pytest.raises(Error, match="another way for the reference: tanh where the input meets relu"):
        deeplift(Branch(), inputs.abs())
    with pytest.raises(Error, match="say with target="):
        deeplift(mlp(), data(2, 4))
    with pytest.raises(Error, match="one reference an example, got 3"):
        deeplift(mlp(), data(2, 4), target=0, baselines=data(3, 2, 4))
    with pytest.raises(Error, match="at least one"):
        deeplift(mlp(), data(0, 4), target=0)
    with pytest.raises(Error, match="no layer '9'"):
        deeplift(mlp(), data(2, 4), target=0, layer="9")
    with pytest.raises(Error, match="names of layers"):
        unit_importance(mlp(), [data(2, 4)], [])
    with pytest.raises(Error, match=r"needs batches \(inputs, labels\)"):
        unit_importance(mlp(), [data(2, 4)], ["0"])
    with pytest.raises(Error, match="at least one example"):
        unit_importance(mlp(), [], ["0"])
