"""A rule on an optimizer: `control`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.prune.sparse import Controller, Rule, control
from weightsmith.prune.sparse._controller import momentum_of

sparse = ws.prune.sparse


def net(seed: int = 0, width: int = 12) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def run(model: nn.Module, optimizer: Any, steps: range, after: Callable[[int], None] = lambda step: None) -> None:
    for step in steps:
        inputs, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        after(step)


def outside(model: nn.Module, masks: Controller) -> int:
    """Weights that should not be there and are."""
    state, found = model.state_dict(), masks.masks
    return sum(int((state[name][~found[name]] != 0).sum()) for name in found)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=True, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
RULES: dict[str, Rule] = {
    "static": sparse.static(0.8),
    "gmp": sparse.gmp(0.8, every=3, stop=15),
    "gmp global": sparse.gmp(0.8, every=4, stop=15, start=2, scope="global"),
    "set": sparse.sparse_evolutionary(0.8, every=3, stop=15),
    "rigl": sparse.rigl(0.8, every=3, stop=15),
    "sparse_momentum": sparse.sparse_momentum(0.8, every=3, stop=15),
    "granet dense": sparse.granet(0.8, every=3, stop=12, initial=0.0, last=16),
    "granet": sparse.granet(0.8, every=3, stop=15),
    "soft": sparse.soft_shrinkage(0.8, stop=10),
}
TOTAL = 6 * 12 + 12 * 12 + 12 * 3


@pytest.mark.parametrize("which", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["rigl", "granet", "gmp global"])
def test_weights_outside_the_masks_are_exactly_zero(which: str, rule: str):
    model = net()
    optimizer = OPTIMIZERS[which](model.parameters())
    masks = control(model, optimizer, RULES[rule])
    seen = []

    def after(step: int) -> None:
        assert outside(model, masks) == 0
        kept = sum(int(masks.masks[name].sum()) for name in masks.masks)
        assert kept == sum(masks.info.kept.values())
        seen.append(kept)
        for name, parameter in model.named_parameters():
            if name in masks.masks:
                for key, value in optimizer.state[parameter].items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step_size":
                        assert not value[~masks.masks[name]].any(), (key, step)

    run(model, optimizer, range(18), after)
    assert seen[-1] == TOTAL - round(0.8 * TOTAL)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", RULES)
def test_counts_follow_the_schedule_at_every_step(name: str):
    rule = RULES[name]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = control(model, optimizer, rule, seed=3)
    last = [0.0 if rule.shrink else rule.sparsity if rule.initial is None else rule.initial]

    def after(step: int) -> None:
        if rule.due(step + 1):
            last[0] = rule.sparsity_at(step + 1)
        kept = sum(int(masks.masks[name].sum()) for name in masks.masks)
        assert kept == TOTAL - round(last[0] * TOTAL), step
        assert masks.sparsity == pytest.approx(1 - kept / TOTAL)
        if not rule.soft(step + 1):
            assert outside(model, masks) == 0

    run(model, optimizer, range(18), after)
    assert masks.step == 18


def test_the_loop_by_hand_for_a_fixed_mask():
    model, plain = net(), net()
    masks = control(model, torch.optim.SGD(model.parameters(), lr=0.0), sparse.static(0.7)).masks.to_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    control(model, optimizer, sparse.static(), masks=masks)
    run(model, optimizer, range(6))
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.1)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
    for step in range(6):
        inputs, labels = batch(step)
        reference.zero_grad()
        nn.functional.cross_entropy(plain(inputs), labels).backward()
        for name, mask in masks.items():
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.mul_(mask)
        reference.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_growth_uses_the_gradient_of_that_step_at_weights_before_it():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.rigl(0.8, every=2, stop=10, fraction=0.6), densities="uniform")
    run(model, optimizer, range(1))
    before, old = copy.deepcopy(model), masks.masks.to_dict()
    inputs, labels = batch(1)
    nn.functional.cross_entropy(before(inputs), labels).backward()
    run(model, optimizer, range(1, 2))
    assert not masks._gradients  # nothing of the size of the model is held between exchanges
    fraction = masks.rule.fraction_at(2)
    for name, parameter in before.named_parameters():
        if name not in old:
            continue
        gradient = parameter.grad
        assert gradient is not None
        stepped = (parameter.detach() - 0.1 * gradient * old[name]) * old[name]
        count = int(old[name].sum())
        order = stepped.abs().flatten()[old[name].flatten()].sort(descending=True).values
        gone = round(fraction * count)
        stay = (stepped.abs() >= order[count - gone - 1]) & old[name]
        free = gradient.abs().masked_fill(stay, -1)
        expected = stay | (free >= free.flatten().sort(descending=True).values[gone - 1])
        assert torch.equal(masks.masks[name], expected)
        new = expected & ~old[name]
        assert not model.state_dict()[name][new].any()
        assert masks.info.grown[name] == int(new.sum())
        assert masks.info.dropped[name] == int((old[name] & ~expected).sum())


def test_what_grew_learns_and_starts_with_clean_momentum():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    masks = control(model, optimizer, sparse.rigl(0.8, every=3, stop=9, fraction=0.5))
    before: dict[str, Tensor] = {}
    run(model, optimizer, range(2))
    before = masks.masks.to_dict()
    run(model, optimizer, range(2, 3))
    grown = {name: masks.masks[name] & ~before[name] for name in before}
    assert sum(int(mask.sum()) for mask in grown.values()) > 5
    for name, parameter in model.named_parameters():
        if name in grown and grown[name].any():
            state, stayed = optimizer.state[parameter], masks.masks[name] & before[name]
            assert not state["exp_avg"][grown[name]].any()
            mean = state["exp_avg_sq"][stayed].mean().expand(int(grown[name].sum()))
            torch.testing.assert_close(state["exp_avg_sq"][grown[name]], mean, rtol=1e-4, atol=0.0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, optimizer, range(3, 4))
    for name, mask in grown.items():
        steps = (model.state_dict()[name] - start[name])[mask].abs()
        assert (steps <= 0.05).all()  # from second moments of zero they would be many times the learning rate
    moved = sum(int(model.state_dict()[name][mask].count_nonzero()) for name, mask in grown.items())
    assert moved > 0


def test_momentum_from_before_is_forgotten_where_weights_go_or_come():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run(model, optimizer, range(3))
    masks = control(model, optimizer, sparse.rigl(0.8, every=2, stop=8, fraction=0.5))
    before = masks.masks.to_dict()
    run(model, optimizer, range(3, 5))
    parameters, grown = dict(model.named_parameters()), 0
    for name, mask in masks.masks.items():
        stayed = mask & before[name]
        grown += int((mask & ~before[name]).sum())
        momentum = optimizer.state[parameters[name]]["momentum_buffer"]
        assert momentum[stayed].any()
        assert not momentum[~stayed].any()
    assert grown > 5


@pytest.mark.parametrize("rule", ["sparse_momentum", "soft"])
def test_momentum_stays_dense_where_the_rule_needs_it(rule: str):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = control(model, optimizer, RULES[rule])
    run(model, optimizer, range(3))
    assert masks.info.step == 3  # also right after a change
    assert optimizer.state[model[2].weight]["momentum_buffer"][~masks.masks["2.weight"]].any()
    assert rule == "soft" or outside(model, masks) == 0


def test_soft_shrinkage_by_hand():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    masks = control(model, optimizer, sparse.soft_shrinkage(0.5, stop=3, amount=0.1), densities="uniform")
    assert masks.sparsity == 0.0
    run(model, optimizer, range(2))
    for name in masks.masks:
        out = ~masks.masks[name]
        assert int(out.sum()) == round(0.5 * out.numel())
        expected = torch.where(out, start[name] * 0.9 * 0.9, start[name])
        torch.testing.assert_close(model.state_dict()[name], expected)
    run(model, optimizer, range(2, 3))
    assert outside(model, masks) == 0
    assert masks.sparsity == pytest.approx(0.5)


def test_what_shrinks_still_learns():
    model, plain = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    masks = control(model, optimizer, sparse.soft_shrinkage(0.5, stop=9, amount=0.1), densities="uniform")
    parameters = dict(plain.named_parameters())
    for step in range(3):
        inputs, labels = batch(step)
        plain.zero_grad()
        nn.functional.cross_entropy(plain(inputs), labels).backward()
        run(model, optimizer, range(step, step + 1))
        with torch.no_grad():
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                parameter.sub_(0.5 * parameter.grad)
                if name in masks.masks:
                    small = parameter.abs() <= parameter.abs().flatten().sort().values[parameter.numel() // 2 - 1]
                    assert torch.equal(small, ~masks.masks[name])
                    parameter.mul_(torch.where(small, 0.9, 1.0))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, parameters[name].detach())


def test_momentum_is_divided_by_its_size_where_that_is_known():
    first, second = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([4.0, 1.0, 0.0])
    found = momentum_of({"exp_avg": first, "exp_avg_sq": second})
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([0.5, -2.0, 0.0]))
    assert momentum_of({"exp_avg": first}) is first  # Lion has no second moment
    assert momentum_of({"momentum_buffer": second}) is second
    assert momentum_of({"momentum_buffer": None, "step": 3}) is None


def test_with_an_amount_of_one_shrinking_is_hard_thresholding():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.soft_shrinkage(0.8, stop=9, amount=1.0))
    seen: list[int] = []
    run(model, optimizer, range(5), lambda step: seen.append(outside(model, masks)))
    assert seen == [0] * 5
    assert sum(int(model.state_dict()[name].count_nonzero()) for name in masks.masks) <= TOTAL - round(0.8 * TOTAL)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("way", ["state=", "load_state_dict"])
def test_a_run_goes_on_bit_for_bit(name: str, way: str):
    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, torch.optim.AdamW(model.parameters(), lr=0.02)

    model, optimizer = begin()
    masks = control(model, optimizer, RULES[name], seed=5)
    run(model, optimizer, range(7))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), masks.state_dict()], file)
    run(model, optimizer, range(7, 18))
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    again, other = begin()
    if way == "state=":
        again.load_state_dict(weights)
        resumed = control(again, other, RULES[name], state=state)
    else:
        resumed = control(again, other, RULES[name], seed=99)
        resumed.load_state_dict(state)
        again.load_state_dict(weights)
    other.load_state_dict(moments)
    run(again, other, range(7, 18))
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(resumed.masks[name], masks.masks[name]) for name in masks.masks)
    assert resumed.step == masks.step == 18


def test_close_and_with_take_the_hooks_off():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with control(model, optimizer, sparse.static(0.9)) as masks:
        run(model, optimizer, range(2))
        assert outside(model, masks) == 0
    run(model, optimizer, range(2))
    assert outside(model, masks) > 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_gradients_may_be_accumulated():
    results = []
    for parts in (1, 4):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masks = control(model, optimizer, sparse.rigl(0.8, every=2, stop=8))
        for step in range(6):
            inputs, labels = batch(step)
            optimizer.zero_grad()
            for part in torch.arange(8).chunk(parts):
                loss = nn.functional.cross_entropy(model(inputs[part]), labels[part])
                (loss / parts).backward()
            optimizer.step()
        results.append((masks.step, masks.masks.to_dict()))
    assert results[0][0] == results[1][0] == 6
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool):
    ours, plain = net(), net()
    kept = []
    for model, scaled in ((ours, True), (plain, False)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        masks = control(model, optimizer, sparse.rigl(0.8, every=2, stop=8))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(6):
            inputs, labels = batch(step)
            if scaled and step in (1, 3):  # an overflow, at a step at which masks would move
                optimizer.zero_grad()
                scaler.scale(model(inputs).sum() * torch.inf).backward()
                scaler.step(optimizer)
                scaler.update()
                assert masks.step == step
                assert outside(model, masks) == 0
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert masks.step == 6
        kept.append(masks.masks.to_dict())
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_clipping_sees_what_counts():
    norms, found = [], []
    for called in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = control(model, optimizer, sparse.rigl(0.8, every=1, stop=8))
        for step in range(3):
            inputs, labels = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            if called:
                masks.mask_gradients()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
            optimizer.step()
        found.append(masks.masks.to_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # growth knew the gradients
    assert all(clipped < whole for clipped, whole in zip(norms[3:], norms[:3], strict=True))


def test_gradients_of_a_skipped_step_are_forgotten():
    found = []
    for skipped in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = control(model, optimizer, sparse.rigl(0.8, every=1, stop=8))
        if skipped:  # as where a scaler finds infinities after gradients were masked
            model(batch(7)[0]).square().sum().backward()
            masks.mask_gradients()
        run(model, optimizer, range(1))
        assert masks.step == 1
        found.append(masks.masks.to_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_closures_are_masked():
    model, plain = net(), net()
    results = []
    for one, closed in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        masks = control(one, optimizer, sparse.rigl(0.8, every=2, stop=8))
        for step in range(5):
            inputs, labels = batch(step)

            def closure(inputs: Tensor = inputs, labels: Tensor = labels, one: nn.Module = one) -> Tensor:
                one.zero_grad()
                loss = nn.functional.cross_entropy(one(inputs), labels)
                loss.backward()
                return loss

            if closed and step % 2:
                assert optimizer.step(closure=closure) > 0  # type: ignore[operator]
            elif closed:
                assert optimizer.step(closure) > 0  # type: ignore[operator]
            else:
                closure()
                optimizer.step()
        results.append(masks)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert outside(model, results[0]) == 0


def test_lbfgs_goes_with_a_fixed_mask_alone():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ws.Error, match="closure"):
        control(model, optimizer, sparse.rigl(0.8, every=2, stop=10))
    masks = control(model, optimizer, sparse.static(0.5))
    inputs, labels = batch(0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
    assert float(closure().detach()) < 0.1 * first
    assert outside(model, masks) == 0


def test_averages_keep_the_zeros():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = control(model, optimizer, sparse.rigl(0.8, every=2, stop=6))
    run(model, optimizer, range(6))
    ours, theirs = ws.average.swa(), torch.optim.swa_utils.AveragedModel(model)

    def after(step: int) -> None:
        ours.update(model)
        theirs.update_parameters(model)

    run(model, optimizer, range(6, 10), after)
    for name, mask in masks.masks.items():
        assert not ours.weights()[name][~mask].any()
        assert not theirs.module.state_dict()[name][~mask].any()


def test_schedulers_and_groups_work_as_before():
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    masks = control(model, optimizer, sparse.rigl(0.5, every=2, stop=8))
    assert list(masks.masks) == ["0.weight", "2.weight"]  # 4.weight is not trained
    before = model[4].weight.clone()
    run(model, optimizer, range(4), lambda step: schedule.step())
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.002)
    assert outside(model, masks) == 0
    assert torch.equal(model[4].weight, before)


def test_tied_parameters_have_one_mask():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = control(model, optimizer, sparse.rigl(0.5, every=2, stop=8), densities="uniform")
    run(model, optimizer, range(5))
    assert list(masks.masks) == ["0.weight", "3.weight"]
    assert int(model[0].weight.count_nonzero()) <= 18
    assert outside(model, masks) == 0


def test_parameters_without_gradient_keep_their_masks():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.rigl(0.5, every=1, stop=8))
    before = masks.masks.to_dict()
    model[0].requires_grad_(False)
    run(model, optimizer, range(3))
    assert torch.equal(masks.masks["0.weight"], before["0.weight"])
    assert not torch.equal(masks.masks["2.weight"], before["2.weight"])


def test_weights_loaded_in_between_are_masked_at_the_next_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.static(0.9))
    model.load_state_dict(net(1).state_dict())
    assert outside(model, masks)
    run(model, optimizer, range(1))
    assert outside(model, masks) == 0


def test_bfloat16_and_convolutions():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = control(model, optimizer, sparse.rigl(0.5, every=2, stop=8))
    assert list(masks.masks) == ["0.weight", "3.weight"]
    for step in range(6):
        optimizer.zero_grad()
        inputs = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        model(inputs).square().sum().backward()
        optimizer.step()
        assert outside(model, masks) == 0
    assert model[0].weight.dtype == torch.bfloat16
    assert sum(masks.info.kept.values()) == 84 - 42


def test_densities():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    uniform = control(model, optimizer, sparse.static(0.75), densities="uniform").info.kept
    assert uniform == {"0.weight": 18, "2.weight": 36, "4.weight": 9}
    other = net()
    kept = control(other, torch.optim.SGD(other.parameters(), lr=0.1), sparse.static(0.75)).info.kept
    ratio = {"0.weight": 18, "2.weight": 24, "4.weight": 15}  # in proportion to rows + columns
    scale = sum(ratio.values()) / 63
    assert sum(kept.values()) == 63
    assert all(abs(kept[name] - ratio[name] / scale) < 1 for name in kept)
    given = {"0.weight": 1.0, "2.weight": 0.1, "4.weight": 0.5}
    other = net()
    masks = control(other, torch.optim.SGD(other.parameters(), lr=0.1), sparse.static(), densities=given)
    assert masks.info.kept == {"0.weight": 72, "2.weight": 14, "4.weight": 18}


def test_rescaled_weights_compute_values_as_large_as_dense_ones():
    model = net(width=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.static(0.75), rescale=True)
    for name, value in model.state_dict().items():
        if name in masks.masks:
            mask = masks.masks[name]
            expected = before[name] * mask * (mask.numel() / mask.sum()) ** 0.5
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(value, before[name])
    again = copy.deepcopy(model)
    control(again, torch.optim.SGD(again.parameters(), lr=0.1), sparse.static(), rescale=True, state=masks.state_dict())
    assert torch.equal(again[0].weight, model[0].weight)  # what goes on is not scaled twice


def test_given_densities_are_reached_together():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"0.weight": 1.0, "2.weight": 0.25, "4.weight": 0.5}
    sparsity = 1 - (72 + 36 + 18) / TOTAL
    masks = control(model, optimizer, sparse.gmp(sparsity, every=1, stop=4), densities=given)
    run(model, optimizer, range(2))
    part = 1 - (1 - 2 / 4) ** 3
    for name, numel in (("0.weight", 72), ("2.weight", 144), ("4.weight", 36)):
        assert abs(masks.info.kept[name] - (1 - part * (1 - given[name])) * numel) <= 1
    run(model, optimizer, range(2, 5))
    assert masks.info.kept == {"0.weight": 72, "2.weight": 36, "4.weight": 18}


def test_given_masks_are_begun_with():
    model, found = net(), net()
    chosen = ws.prune.magnitude(net(), 0.6, scope="global", action="mask")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.rigl(every=2, stop=8), masks=chosen)
    assert all(torch.equal(masks.masks[name], chosen[name]) for name in chosen)
    run(model, optimizer, range(5))
    assert {name: int(chosen[name].sum()) for name in chosen} == dict(masks.info.kept)
    other = torch.optim.SGD(found.parameters(), lr=0.1)
    gradual = control(found, other, sparse.granet(0.9, every=2, stop=8), masks=chosen)
    assert gradual.sparsity == pytest.approx(0.6, abs=0.003)
    run(found, other, range(9))
    assert gradual.sparsity == pytest.approx(0.9, abs=0.003)


def test_the_random_state_and_what_is_not_pruned_stay():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    masks = control(model, torch.optim.SGD(model.parameters(), lr=0.1), sparse.static(0.5), pattern="2.weight")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(masks.masks) == ["2.weight"]
    for name, value in model.state_dict().items():
        kept = masks.masks[name] if name in masks.masks else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, before[name] * kept)


def test_masks_differ_by_seed_and_by_tensor():
    found = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        masks = control(model, torch.optim.SGD(model.parameters(), lr=0.1), sparse.static(0.5), seed=seed).masks
        found.append(masks.to_dict())
    assert torch.equal(found[0]["0.weight"], found[1]["0.weight"])
    assert not torch.equal(found[0]["0.weight"], found[2]["0.weight"])
    assert not torch.equal(found[0]["0.weight"], found[0]["1.weight"])


def test_refusals_come_before_anything_is_changed():
    model = net()
    before = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    rigl, half = sparse.rigl(0.5, every=2, stop=9), {"0.weight": torch.ones(12, 6, dtype=torch.bool)}
    few = {name: torch.rand_like(model.state_dict()[name]) < 0.4 for name in half}
    cases: list[tuple[str, Callable[[], object]]] = [
        ("momentum", lambda: control(model, sgd, sparse.sparse_momentum(0.5, every=1, stop=9))),
        ("trains none", lambda: control(model, torch.optim.SGD(net().parameters(), lr=0.1), rigl)),
        ("no float tensor", lambda: control(model, sgd, rigl, pattern="nothing")),
        ("densities", lambda: control(model, sgd, rigl, densities="even")),  # type: ignore[arg-type]
        ("do not fit", lambda: control(model, sgd, rigl, densities={"0.weight": 0.5}, pattern="*.weight")),
        ("no parameter", lambda: control(model, sgd, rigl, densities={"1.weight": 0.5})),
        ("from 0 to 1", lambda: control(model, sgd, rigl, densities={"0.weight": 1.5})),
        ("agree", lambda: control(model, sgd, rigl, densities={"0.weight": 0.1})),
        ("do not fit", lambda: control(model, sgd, rigl, masks=half, pattern="*.weight")),
        ("agree", lambda: control(model, sgd, rigl, masks=half)),
        ("boolean", lambda: control(model, sgd, rigl, masks={"0.weight": torch.ones(12, 6)})),
        ("densities are one less", lambda: control(model, sgd, sparse.static(0.8), densities={"0.weight": 0.8})),
        ("masks=", lambda: control(model, sgd, sparse.rigl(every=2, stop=9))),
        ("in the end", lambda: control(model, sgd, sparse.gmp(0.3, every=1, stop=9), masks=few)),
        ("rigl\\(0.9", lambda: control(model, sgd, "rigl")),  # type: ignore[arg-type]
        ("takes a module", lambda: control(model.parameters(), sgd, rigl)),  # type: ignore[arg-type]
        ("state of 'static'", lambda: control(model, sgd, rigl, state={"rule": "static", "step": 0, "seed": 0})),
    ]
    for words, call in cases:
        with pytest.raises(ws.Error, match=words):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not sgd._optimizer_step_post_hooks


def test_compiled_modules_are_trained_like_others_under_their_own_names():
    found = []
    for compiled in (False, True):
        model = net()
        called: Any = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.AdamW(called.parameters(), lr=0.01)
        masks = control(called, optimizer, RULES["rigl"])
        run(called, optimizer, range(5))
        assert outside(model, masks) == 0
        found.append(masks.masks.to_dict())
    assert list(found[1]) == ["0.weight", "2.weight", "4.weight"]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_frozen_parameters_are_let_alone():
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.rigl(0.5, every=2, stop=8))
    run(model, optimizer, range(3))
    assert list(masks.masks) == ["2.weight", "4.weight"]
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ws.Error, match="frozen"):
        control(model, torch.optim.SGD(model.parameters(), lr=0.1), sparse.static(0.5), pattern="[02].weight")


def test_one_tensor_has_one_controller():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.static(0.5), pattern="0.weight")
    other = control(model, optimizer, sparse.rigl(0.9, every=2, stop=8), pattern="2.weight")
    before = model[4].weight.clone()
    with pytest.raises(ws.Error, match=r"2\.weight already"):
        control(model, optimizer, sparse.static(0.5), pattern="[24].weight")
    assert torch.equal(model[4].weight, before)
    run(model, optimizer, range(3))
    assert outside(model, masks) == outside(model, other) == 0
    other.close()
    assert control(model, optimizer, sparse.static(0.5), pattern="[24].weight").step == 0


def test_a_copy_goes_its_own_way():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    masks = control(model, optimizer, RULES["rigl"])
    run(model, optimizer, range(4))
    again, other, copied = copy.deepcopy((model, optimizer, masks))
    run(again, other, range(4, 8))
    assert (masks.step, copied.step) == (4, 8)
    assert outside(again, copied) == 0
    run(model, optimizer, range(4, 8))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    copied.close()
    assert not copy.deepcopy(copied)._hooks
    run(model, optimizer, range(8, 9))
    assert (masks.step, copied.step) == (9, 8)


def test_masks_follow_a_model_that_is_moved():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.static(0.5))
    torch.__future__.set_swap_module_params_on_conversion(True)  # so does "cuda" by itself: parameters stay the same
    try:
        model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model(torch.zeros(2, 6, device="meta")).sum().backward()
    optimizer.step()
    assert masks.masks["0.weight"].device.type == "meta"
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = control(model, optimizer, RULES["rigl"])
    model.double()
    for step in range(4):
        model(batch(step)[0].double()).square().sum().backward()
        optimizer.step()
    assert masks.info.step == 3
    assert outside(model, masks) == 0


def test_a_step_without_any_gradient():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    masks = control(model, optimizer, sparse.sparse_momentum(0.8, every=1, stop=8))
    before = masks.masks.to_dict()
    optimizer.step()
    assert all(torch.equal(masks.masks[name], before[name]) for name in before)
    run(model, optimizer, range(2))
    assert not all(torch.equal(masks.masks[name], before[name]) for name in before)
    assert outside(model, masks) == 0


def test_what_cannot_be_masked_is_said():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control(model, optimizer, sparse.static(0.5), pattern="*.weight")
    model(torch.arange(3)).sum().backward()
    with pytest.raises(ws.Error, match=r"0\.weight is sparse"):
        optimizer.step()
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(normed.parameters(), lr=0.1)
    with pytest.raises(ws.Error, match="parametrization"):
        control(normed, optimizer, sparse.static(0.5))
    control(normed, optimizer, sparse.static(0.5), pattern="*original1")
    assert float((normed[0].weight == 0).float().mean()) == 0.5


def test_an_optimizer_in_a_wrapper_is_found():
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer):
            self.optimizer = optimizer

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = control(model, Wrapper(optimizer), sparse.static(0.9))  # type: ignore[arg-type]
    run(model, optimizer, range(2))
    assert outside(model, masks) == 0
    assert "static, step=2" in repr(masks)
