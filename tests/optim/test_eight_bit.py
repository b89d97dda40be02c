"""Coded states against the optimizer inside with its states coded by hand after every step; and all that goes along."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests._processes import together
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.optim import EightBit, eight_bit, embeddings, state_bytes, whole_states
from weightsmith.optim import _eight_bit as module
from weightsmith.quantize.codecs import BlockCodec

CODEC = BlockCodec(block=32)
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 2)).to(dtype)


def backward(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(16, 20, generator=generator).to(dtype)
    model.zero_grad()
    loss = (model(inputs) - inputs[:, :2].sin()).square().mean()
    loss.backward()
    return loss


def coded_by_hand(optimizer: torch.optim.Optimizer, smallest: int = 100) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.numel() >= smallest:
                signed = name in ("exp_avg", "momentum_buffer", "grad_avg", "prev")
                codec = BlockCodec(block=32, signed=signed)
                if name != "ax":
                    state[name] = codec.decode(codec.encode(value))


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "together"), [*itertools.product(OPTIMIZERS, (2**22, 700)), ("AdamW", 1), ("SGD", 1), ("NAdam", 1)]
)
def test_it_is_the_optimizer_inside_with_its_states_coded(name: str, together: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TOGETHER", together)
    by_hand, model = net(), net()
    plain = OPTIMIZERS[name](by_hand.parameters())
    coded_by_hand(plain)
    optimizer = eight_bit(OPTIMIZERS[name](model.parameters()), codec=CODEC, smallest=100)
    for step in range(6):
        backward(by_hand, step)
        backward(model, step)
        plain.step()
        coded_by_hand(plain)
        optimizer.step()
        assert same(by_hand, model), step
    assert all(value.isfinite().all() for value in model.parameters())
    for parameter, state in optimizer.state.items():
        if parameter.numel() >= 100:
            assert not [k for k, v in state.items() if k != "ax" and torch.is_tensor(v) and v.shape == parameter.shape]
    if name not in ("plain SGD", "ASGD"):
        assert state_bytes(optimizer) < state_bytes(plain)


def test_bytes_are_less_than_three_tenths():
    model = nn.Linear(256, 256)
    plain, optimizer = (torch.optim.AdamW(model.parameters()) for _ in range(2))
    eight_bit(optimizer)
    model(torch.ones(2, 256)).sum().backward()
    plain.step()
    optimizer.step()
    assert state_bytes(optimizer) < 0.26 * state_bytes(plain)
    # Codes, 32 scales of two states, two steps, and the bias's states as they were.
    assert state_bytes(optimizer) == 2 * (256 * 256 + 32 * 4 + 256 * 4 + 4)


@pytest.mark.parametrize(
    "codec", [BlockCodec(bits=4, block=64), BlockCodec("linear"), BlockCodec("uniform", block=128)]
)
def test_other_codecs(codec: BlockCodec):
    model = net()
    first = float(backward(model, 0).detach())
    optimizer = eight_bit(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), codec=codec, smallest=1)
    trained(optimizer, model, range(30))
    assert float(backward(model, 0).detach()) < first
    assert len(optimizer.state) == 6


def test_small_ones_and_kept_ones_stay_whole():
    model = nn.ModuleDict({"words": nn.Embedding(100, 64), "head": nn.Linear(64, 100)})
    optimizer = eight_bit(torch.optim.AdamW(model.parameters()), keep=embeddings(model))
    assert optimizer.param_groups[0]["whole_states"] == [True, False, False]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    named = {name: list(optimizer.state[value]) for name, value in model.named_parameters()}
    assert named["words.weight"] == ["step", "exp_avg", "exp_avg_sq"] == named["head.bias"]
    assert "exp_avg.codes" in named["head.weight"]


def test_states_that_are_weights_stay_whole():
    model = net()
    optimizer = eight_bit(torch.optim.ASGD(model.parameters()), smallest=1)
    trained(optimizer, model, range(1))
    assert all("ax" in state for state in optimizer.state.values())
    assert module.WHOLE == ("ax",)


def test_what_has_no_gradient_is_left_alone():
    model = net()
    optimizer = eight_bit(torch.optim.AdamW(model.parameters()), smallest=1)
    trained(optimizer, model, range(2))
    backward(model, 2)
    still = next(model.parameters())
    still.grad = None
    before = (still.detach().clone(), {key: value.clone() for key, value in optimizer.state[still].items()})
    optimizer.step()
    assert torch.equal(still, before[0])
    assert all(torch.equal(optimizer.state[still][key], value) for key, value in before[1].items())


@pytest.mark.parametrize("way", ["state dict", "file", "deepcopy", "pickle"])
def test_a_run_goes_on_bit_for_bit(way: str):
    model = net()
    optimizer = eight_bit(torch.optim.AdamW(model.parameters(), lr=1e-2), codec=CODEC, smallest=100)
    trained(optimizer, model, range(4))
    if way == "deepcopy":
        other, again = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        other, again = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(model)
        again = eight_bit(torch.optim.AdamW(other.parameters(), lr=1.0), codec=CODEC, smallest=100)
        saved = copy.deepcopy(optimizer.state_dict())  # PyTorch shares steps
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        again.load_state_dict(saved)
    assert type(again) is type(optimizer)
    assert isinstance(again, EightBit)
    assert again.state_dict().keys() == optimizer.state_dict().keys()
    trained(optimizer, model, range(4, 8))
    assert not same(model, other)  # they share nothing
    trained(again, other, range(4, 8))
    assert same(model, other)
    assert again.param_groups[0]["lr"] == 1e-2


def test_states_of_the_optimizer_inside_are_coded_when_loaded():
    model = net()
    plain = torch.optim.AdamW(model.parameters())
    trained(plain, model, range(3))
    optimizer = eight_bit(torch.optim.AdamW(model.parameters()), smallest=100, keep=[model[2].weight])
    optimizer.load_state_dict(plain.state_dict())
    assert "exp_avg.codes" in optimizer.state[model[0].weight]
    assert "exp_avg" in optimizer.state[model[2].weight]  # the settings of the one that loads count
    assert optimizer.param_groups[0]["whole_states"] == [False, False, True, False, False, False]
    error = whole_states(optimizer).state[model[0].weight]["exp_avg"] - plain.state[model[0].weight]["exp_avg"]
    assert 0 < float(error.norm()) < 0.03 * float(plain.state[model[0].weight]["exp_avg"].norm())


def test_a_run_that_is_coded_from_its_middle_and_back():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(optimizer, model, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    assert eight_bit(optimizer, smallest=100) is optimizer
    assert "exp_avg.codes" in optimizer.state[model[0].weight]
    assert whole_states(optimizer) is optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert list(optimizer.state[model[0].weight]) == ["step", "exp_avg", "exp_avg_sq"]
    trained(optimizer, model, range(3, 5))


def test_codes_that_do_not_fit_are_refused_before_anything_changes():
    model = net()
    optimizer = eight_bit(torch.optim.AdamW(model.parameters()), codec=CODEC, smallest=100)
    trained(optimizer, model, range(2))
    saved = optimizer.state_dict()
    other = eight_bit(torch.optim.AdamW(net().parameters()), codec=BlockCodec(block=64), smallest=100)
    with pytest.raises(Error, match=r"coded by BlockCodec\(.*block=32.*this optimizer codes by .*block=64"):
        other.load_state_dict(saved)
    broken = copy.deepcopy(saved)
    broken["state"][0]["exp_avg.codes"] = broken["state"][0]["exp_avg.codes"][:-1]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(Error, match="state exp_avg of parameter 0 holds no codes"):
        optimizer.load_state_dict(broken)
    del broken["state"][0]["exp_avg.scale"]
    with pytest.raises(Error, match="state exp_avg of parameter 0 holds no codes"):
        optimizer.load_state_dict(broken)
    assert str(optimizer.state_dict()) == str(before)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict())


def test_schedulers_hooks_closures_and_groups():
    model = net()
    optimizer = torch.optim.SGD([{"params": [model[0].weight], "lr": 1.0}, {"params": [model[2].weight]}], lr=0.1,
                                momentum=0.9)  # fmt: skip
    eight_bit(optimizer, smallest=1)
    optimizer.add_param_group({"params": [model[4].weight], "lr": 0.5})
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        seen.append("closure")
        assert torch.is_grad_enabled()
        return backward(model, 0)

    before = [part.weight.detach().clone() for part in (model[0], model[2], model[4])]
    result: Any = optimizer.step(closure)
    scheduler.step()
    assert seen == ["before", "closure", "after"]
    assert float(result.detach()) > 0
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05, 0.25]
    for old, part, lr in zip(before, (model[0], model[2], model[4]), (1.0, 0.1, 0.5), strict=True):
        torch.testing.assert_close(part.weight, old - lr * part.weight.grad)
        assert "momentum_buffer.codes" in optimizer.state[part.weight]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(fused: bool):
    model, by_hand = net(), net()
    optimizer = eight_bit(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused), codec=CODEC, smallest=100)
    plain = eight_bit(torch.optim.AdamW(by_hand.parameters(), lr=1e-2, fused=fused), codec=CODEC, smallest=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 20, generator=generator)
        scaler.scale((model(inputs) - inputs[:, :2].sin()).square().mean()).backward()
        if step == 1:
            next(model.parameters()).grad[0, 0] = torch.inf  # a step that is left out
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            backward(by_hand, step)
            plain.step()
    if not fused:
        assert same(model, by_hand)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        # A fused step that is left out codes its states again, by which blocks may shrink a little.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_what_a_group_counts_it_counts_once(monkeypatch: pytest.MonkeyPatch):
    class Counting(torch.optim.Optimizer):
        def __init__(self, params: Any):
            super().__init__(params, {"count": 0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["count"] += 1
                for parameter in group["params"]:
                    memory = self.state[parameter].setdefault("memory", torch.zeros_like(parameter))
                    memory.add_(parameter.grad, alpha=group["count"])
                    parameter.sub_(memory, alpha=0.01)

    monkeypatch.setattr(module, "TOGETHER", 1)
    model = net()
    optimizer = eight_bit(Counting(model.parameters()), smallest=1)
    trained(optimizer, model, range(3))
    assert optimizer.param_groups[0]["count"] == 3
    assert all("memory.codes" in state for state in optimizer.state.values())


def test_an_error_inside_leaves_the_groups_whole():
    model = net()
    optimizer = eight_bit(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), smallest=1)
    trained(optimizer, model, range(1))
    backward(model, 1)
    good = model[2].weight.grad
    assert good is not None
    model[2].weight.grad = good.to_sparse()
    optimizer.param_groups[0]["weight_decay"] = 0.1  # which has no sparse form
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 6
    model[2].weight.grad = good
    optimizer.step()
    assert all("momentum_buffer.codes" in state for state in optimizer.state.values())


def test_low_precision_parameters_and_states_of_another_dtype():
    model = net(torch.bfloat16)
    optimizer = eight_bit(torch.optim.AdamW(model.parameters(), lr=1e-2), smallest=100)
    trained(optimizer, model, range(3))
    assert "exp_avg.dtype" not in optimizer.state[model[0].weight]
    assert whole_states(optimizer).state[model[0].weight]["exp_avg"].dtype == torch.bfloat16
    optimizer.state[model[0].weight]["exp_avg"] = torch.randn(30, 20)
    eight_bit(optimizer, smallest=100)
    assert optimizer.state[model[0].weight]["exp_avg.dtype"].nbytes == 0
    again = eight_bit(torch.optim.AdamW(model.parameters(), lr=1e-2), smallest=100)
    again.load_state_dict(optimizer.state_dict())
    for one in (optimizer, again):
        assert one.state[model[0].weight]["exp_avg.scale"].dtype == torch.float32
        assert whole_states(one).state[model[0].weight]["exp_avg"].dtype == torch.float32


def test_the_order_in_memory_is_the_parameters():
    layer = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    optimizer = eight_bit(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), smallest=100)
    layer(torch.ones(1, 8, 4, 4)).sum().backward()
    optimizer.step()
    state = whole_states(optimizer).state[layer.weight]
    assert state["momentum_buffer"].stride() == layer.weight.stride()
    torch.testing.assert_close(state["momentum_buffer"], layer.weight.grad, rtol=0.03, atol=0)


def test_a_gradient_that_is_not_finite_is_seen():
    model = net()
    optimizer = eight_bit(torch.optim.AdamW(model.parameters()), smallest=1)
    trained(optimizer, model, range(1))
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert bool(optimizer.state[model[0].weight]["exp_avg.scale"].isnan().any())
    assert bool(model[0].weight.isnan().any())


@pytest.mark.parametrize(("make", "words"), [
    (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS"),
    (lambda m: torch.optim.AdamW(m.parameters(), differentiable=True), "differentiable"),
    (lambda m: eight_bit(torch.optim.AdamW(m.parameters())), "coded already"),
    (lambda m: m, "needs a torch.optim.Optimizer, got Sequential"),
])  # fmt: skip
def test_refusals(make: Any, words: str):
    with pytest.raises(Error, match=words):
        eight_bit(make(net()))


def test_more_refusals():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(Error, match="keep is a list of parameters"):
        eight_bit(optimizer, keep=["0.weight"])  # type: ignore[list-item]
    with pytest.raises(Error, match="needs an optimizer that eight_bit changed, got SGD"):
        whole_states(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(Error, match="before making schedulers"):
        eight_bit(optimizer)
    assert type(optimizer) is torch.optim.SGD


def test_codes_are_not_coded_again_where_nothing_moves():
    """Each time they are, a block whose largest is negative would shrink: -1 is not in the table."""
    moving, still = (nn.Parameter(torch.zeros(64)) for _ in range(2))
    optimizer = eight_bit(torch.optim.SGD([moving, still], lr=0.1, momentum=0.9), smallest=1)
    still.grad = -torch.linspace(0, 1, 64)
    moving.grad = still.grad.clone()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[still].items()}
    still.grad = None
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(optimizer.state[still][key], value) for key, value in before.items())


def test_what_is_kept_whole_is_not_loaded():
    model = net()
    optimizer = eight_bit(torch.optim.AdamW(model.parameters()), smallest=100, keep=[model[0].weight])
    trained(optimizer, model, range(1))
    again = eight_bit(torch.optim.AdamW(model.parameters()), smallest=100)
    again.load_state_dict(optimizer.state_dict())
    assert "whole_states" not in again.param_groups[0]
    assert "exp_avg.codes" in again.state[model[0].weight]


# Sharded parameters, in two processes


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 31), nn.Tanh(), nn.Linear(31, 2))  # 31 rows are not even over 2


def work(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = wide()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    codec = BlockCodec(block=20)  # blocks are rows, so that cutting by rows changes none
    optimizer = eight_bit(torch.optim.AdamW(model.parameters(), lr=1e-2), codec=codec, smallest=100)
    trained(optimizer, model, range(3))
    state = optimizer.state[model[0].weight]
    assert "exp_avg.codes" in state
    assert len(state["exp_avg.codes"]) == 20 * (16 if rank == 0 else 15)
    saved = optimizer.state_dict()
    assert isinstance(saved["state"][0]["exp_avg"], DTensor)
    assert "exp_avg.codes" in state  # it goes on with codes
    again = eight_bit(torch.optim.AdamW(model.parameters(), lr=1e-2), codec=codec, smallest=100)
    again.load_state_dict(saved)
    assert "exp_avg.codes" in again.state[model[0].weight]
    trained(optimizer, model, range(3, 5))
    found = {name: value.full_tensor() for name, value in model.state_dict().items()}
    torch.save((found, saved["state"][0]["exp_avg"].full_tensor()), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no processes")
def test_shards_are_coded_where_they_are(tmp_path: Path):
    together(__file__, tmp_path, imports=["torch.distributed.fsdp"])
    with torch.random.fork_rng():
        model = wide()
    optimizer = eight_bit(torch.optim.AdamW(model.parameters(), lr=1e-2), codec=BlockCodec(block=20), smallest=100)
    trained(optimizer, model, range(3))
    moments = whole_states(copy.deepcopy(optimizer))
    parameter = moments.param_groups[0]["params"][0]
    trained(optimizer, model, range(3, 5))
    for rank in range(2):
        found, moment = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(moment, moments.state[parameter]["exp_avg"], rtol=0.1, atol=1e-6)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_every_option_has_a_state_of_its_own_class():
    classes = {
        type(eight_bit(torch.optim.SGD(net().parameters(), lr=1.0), codec=codec, smallest=smallest))
        for codec, smallest in itertools.product((CODEC, BlockCodec()), (1, 2))
    }
    assert len(classes) == 4
    assert {one.__name__ for one in classes} == {"EightBitSGD"}
