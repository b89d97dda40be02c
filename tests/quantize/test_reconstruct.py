"""Blocks that learn to give what they gave: what they are given, what comes out, and what is left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.quantize import dequantize, reconstruct, rtn, sequential
from weightsmith.quantize._learners import Train
from weightsmith.quantize.grids import Integer
from weightsmith.weights import Weights, open

GRID: dict[str, Any] = {"bits": 2, "group": 4, "symmetric": False}


class Block(nn.Module):
    """Two layers added to the stream."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def network(seed: int = 0, blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def data(count: int = 4, start: int = 0) -> list[Tensor]:
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(99)) / 2
    return [torch.randn(24, 12, generator=torch.Generator().manual_seed(start + i)) @ mix for i in range(count)]


def error(net: nn.Module, found: Weights, batches: list[Tensor]) -> float:
    """How far outputs are apart."""
    made = copy.deepcopy(net)
    found.load_into(made)
    with torch.no_grad():
        return float(torch.stack([(made(x) - net(x)).square().mean() for x in batches]).mean())


@pytest.mark.parametrize("train", get_args(Train))
def test_it_beats_rounding_on_other_inputs(train: Train):
    net = network(blocks=2)
    before = copy.deepcopy(net.state_dict())
    found = reconstruct(net, data(), train, steps=50, action="values", **GRID)
    usual = error(net, rtn(net, action="values", **GRID), data(start=50))
    assert error(net, found, data(start=50)) < (0.95 if train == "low-rank rounding" else 0.8) * usual
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert net.training


def test_codes_stand_for_the_values():
    net = network()
    codes = reconstruct(net, data(), steps=10, **GRID)
    values = reconstruct(net, data(), steps=10, action="values", **GRID)
    back = dequantize(codes)
    assert set(back) == set(values) == set(net.state_dict())
    for name in values:
        assert torch.equal(values[name], back[name])
        assert values[name].dtype == net.state_dict()[name].dtype
    assert not torch.equal(
        values["0.up.weight"], reconstruct(net, data(), steps=10, seed=1, action="values", **GRID)["0.up.weight"]
    )


def test_inputs_are_those_of_quantized_blocks(monkeypatch: pytest.MonkeyPatch):
    """The first layer of what blocks learn on, and what they should give, by hand."""
    from weightsmith.quantize import _reconstruct

    net, seen = network(blocks=2), {}
    usual = _reconstruct._Visitor.pairs

    def noted(self: Any, block: Any) -> Any:
        found = usual(self, block)
        seen[block.index] = [(hidden.clone(), target.clone()) for _, hidden, target in found]
        return found

    monkeypatch.setattr(_reconstruct._Visitor, "pairs", noted)
    for propagate in ("changed", "dense", "both"):
        found = reconstruct(net, data(), steps=3, propagate=propagate, action="values", **GRID)
        made = copy.deepcopy(net)
        found.load_into(made)
        with torch.no_grad():
            dense = [(net[0](x), net(x)) for x in data()]
            changed = [made[0](x) for x in data()]
            expected = {
                "changed": [(x, out) for x, (_, out) in zip(changed, dense, strict=True)],
                "dense": dense,
                "both": [*dense, *((x, net[1](x)) for x in changed)],
            }[propagate]
        assert len(seen[1]) == len(expected)
        for mine, theirs in zip(seen[1], expected, strict=True):
            torch.testing.assert_close(mine[0], theirs[0])
            torch.testing.assert_close(mine[1], theirs[1])


@pytest.mark.parametrize(("window", "overlap"), [(2, 0), (2, 1), (3, 1)])
def test_later_windows_are_given_what_all_blocks_before_give(
    window: int, overlap: int, monkeypatch: pytest.MonkeyPatch
):
    from weightsmith.quantize import _reconstruct

    net, seen = network(blocks=4), {}
    usual = _reconstruct._Visitor.pairs

    def noted(self: Any, block: Any) -> Any:
        found = usual(self, block)
        seen[self.members[0].block.index] = [(one.clone(), other.clone(), block.index) for _, one, other in found]
        return found

    monkeypatch.setattr(_reconstruct._Visitor, "pairs", noted)
    found = reconstruct(net, data(2), steps=2, window=window, overlap=overlap, action="values", **GRID)
    made = copy.deepcopy(net)
    found.load_into(made)
    assert len(seen) > 1
    for start, pairs in seen.items():
        with torch.no_grad():
            for x, (given, target, stop) in zip(data(2), pairs, strict=True):
                torch.testing.assert_close(given, made[:start](x))
                torch.testing.assert_close(target, net[: stop + 1](x))


def test_windows(monkeypatch: pytest.MonkeyPatch):
    """Which blocks learn together; each is in the end finished once, in order."""
    from weightsmith.quantize import _reconstruct

    net, windows = network(blocks=5), []
    usual = _reconstruct._Visitor.learn

    def noted(self: Any, block: Any) -> None:
        windows.append([member.block.index for member in self.members])
        usual(self, block)

    monkeypatch.setattr(_reconstruct._Visitor, "learn", noted)
    for window, overlap, expected in (
        (1, 0, [[0], [1], [2], [3], [4]]),
        (2, 1, [[0, 1], [1, 2], [2, 3], [3, 4]]),
        (2, 0, [[0, 1], [2, 3], [4]]),
        (3, 1, [[0, 1, 2], [2, 3, 4]]),
        (9, 4, [[0, 1, 2, 3, 4]]),
    ):
        windows.clear()
        for propagate in ("changed", "both"):
            windows.clear()
            found = reconstruct(
                net, data(2), "low-rank rounding", steps=2, window=window, overlap=overlap, propagate=propagate, **GRID
            )
            assert windows == expected
            assert sum(name.endswith("_packed") for name in found) == 10


@pytest.mark.parametrize("window", [1, 2, 3])
def test_blocks_without_tensors_are_gone_through(window: int, monkeypatch: pytest.MonkeyPatch):
    """What is between layers, before the first and after the last."""
    from weightsmith.quantize import _reconstruct

    torch.manual_seed(0)
    net, seen = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh()), []
    usual = _reconstruct._Visitor.pairs

    def noted(self: Any, block: Any) -> Any:
        found = usual(self, block)
        seen.append((self.members[0].block.index, block.index, [(one, other) for _, one, other in found]))
        return found

    monkeypatch.setattr(_reconstruct._Visitor, "pairs", noted)
    found = reconstruct(net, data(2), bits=2, steps=3, window=window, action="values")
    assert all((found[f"{at}.weight"] != net[at].weight).any() for at in (1, 3))
    made = copy.deepcopy(net)
    found.load_into(made)
    for start, stop, pairs in seen:
        with torch.no_grad():
            for x, (given, target) in zip(data(2), pairs, strict=True):
                torch.testing.assert_close(given, made[:start](x))
                torch.testing.assert_close(target, net[: stop + 1](x))
    assert len(seen) >= 1


def test_layers_that_have_no_say_stay_nearest():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    net = nn.Sequential(Idle(), *network(blocks=1))
    net[1].idle = nn.Linear(12, 4)
    with torch.no_grad():  # gradients are wanted all the same
        found = reconstruct(net, data(), steps=5, action="values", **GRID)
    usual = rtn(net, action="values", **GRID)
    assert torch.equal(found["0.layer.weight"], usual["0.layer.weight"])
    assert torch.equal(found["1.idle.weight"], usual["1.idle.weight"])
    assert not torch.equal(found["1.up.weight"], usual["1.up.weight"])


@pytest.mark.parametrize("divergence", [0.0, 0.25, 4.0])
def test_both_parts_of_the_loss(divergence: float, monkeypatch: pytest.MonkeyPatch):
    """Each is measured in what it is at the start, so the first step has a loss of one and the share of the other."""
    from weightsmith.quantize import _reconstruct

    net, seen = network(blocks=1), []
    usual = _reconstruct._Visitor.loss

    def noted(self: Any, pair: Any, values: Any, scale: Any) -> Tensor:
        found = usual(self, pair, values, scale)
        with torch.no_grad():
            one, other = (self.through(pair[0], pair[1], each).log_softmax(-1) for each in (values, [{}]))
            apart = (self.through(pair[0], pair[1], values) - pair[2]).square().mean()
            seen.append((float(found), float(apart), float((other.exp() * (other - one)).mean())))
        return found

    monkeypatch.setattr(_reconstruct._Visitor, "loss", noted)
    reconstruct(net, data(1), steps=8, divergence=divergence, **GRID)
    first = seen[0]
    for found, apart, other in seen:
        assert found == pytest.approx(apart / first[1] + divergence * other / first[2], rel=1e-4)
    assert seen[-1][1] < first[1]


@pytest.mark.parametrize("action", ["codes", "values"])
@pytest.mark.parametrize("propagate", ["changed", "dense", "both"])
def test_a_run_that_was_broken_off_is_continued(
    propagate: Any, action: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from weightsmith.quantize import _reconstruct

    net = nn.Sequential(Block(), nn.Tanh(), Block(), Block())
    options: dict[str, Any] = {"steps": 4, "propagate": propagate, "action": action, **GRID}
    whole = reconstruct(net, data(2), **options)
    usual = _reconstruct._Visitor.learn

    def broken(self: Any, block: Any) -> None:
        if block.index == 2:
            raise KeyboardInterrupt
        usual(self, block)

    monkeypatch.setattr(_reconstruct._Visitor, "learn", broken)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(net, data(2), store=tmp_path / "store", **options)
    monkeypatch.setattr(_reconstruct._Visitor, "learn", usual)
    with pytest.raises(Error):
        reconstruct(net, data(2), store=tmp_path / "store", resume=True, **{**options, "steps": 5})
    for _ in range(2):  # the second time all is there
        found = reconstruct(net, data(2), store=tmp_path / "store", resume=True, **options)
        assert list(found) == list(whole)
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    with pytest.raises(Error, match="finish together"):
        reconstruct(net, data(2), store=tmp_path / "other", window=2, **options)


def test_blocks_that_learn_together_end_nearer():
    ratios = []
    for seed in range(3):
        net = network(seed)
        options: dict[str, Any] = {"steps": 40, "action": "values", **GRID}
        one = error(net, reconstruct(net, data(), window=1, **options), data())
        ratios.append(error(net, reconstruct(net, data(), window=3, **options), data()) / one)
    assert sorted(ratios)[1] < 1


def test_a_block_that_would_end_worse_stays_nearest():
    net = network()
    found = reconstruct(net, data(), "weights and steps", steps=3, lr=50.0, range_lr=3.0, action="values", **GRID)
    usual = rtn(net, action="values", **GRID)
    assert all(torch.equal(found[name], usual[name]) for name in found)


def test_a_layer_alone_comes_near_the_kernel_on_its_gram():
    """One linear layer as a block; the kernel keeps the best that each of its rows has met."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(7))
    given = [torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) @ mix]
    options: dict[str, Any] = {"bits": 2, "symmetric": False, "action": "values", "blocks": ["0"]}
    mine = error(net, reconstruct(net, given, "division", steps=200, lr=0.01, range_lr=0.01, **options), given)
    kernel = error(net, sequential(net, given, "flexround", damp=0.0, **options), given)
    nearest = error(net, sequential(net, given, "rtn", **options), given)
    assert kernel < mine < 0.6 * nearest
    assert mine < 2 * kernel


def test_padded_tokens_do_not_count(shared_llama: Path):
    weights = open(shared_llama)
    tokens = torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    other = tokens.clone()
    other[1, 5:] = (tokens[1, 5:] + 1) % 12
    grid: dict[str, Any] = {"bits": 3, "group": 8, "steps": 4}
    found = [reconstruct(weights, [{"input_ids": one, "attention_mask": mask}], **grid) for one in (tokens, other)]
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-5)


def test_a_language_model_in_half_the_width(shared_llama: Path):
    weights = open(shared_llama)
    tokens = [{"input_ids": torch.randint(12, (2, 8), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    found = reconstruct(
        weights, tokens, "weights and steps", bits=2, group=8, steps=6, window=2, overlap=1, propagate="both",
        compute="bfloat16", divergence=0.5,
    )  # fmt: skip
    back = dequantize(found)
    assert set(back) == set(weights)
    assert torch.equal(back["model.norm.weight"], weights["model.norm.weight"])
    assert all(back[name].isfinite().all() for name in back)


def test_refusals():
    net = network()
    for wrong, told in (
        ({"train": "all"}, "train is one of"),
        ({"propagate": "none"}, "propagate is"),
        ({"steps": 0}, "steps, window and rank"),
        ({"window": 2, "overlap": 2}, "overlap from 0"),
        ({"lr": -1.0}, "0 or more"),
        ({"action": "mask"}, "action is"),
        ({"group": 5}, "do not fill a row"),
        ({"clips": 3}, "clips"),
    ):
        with pytest.raises(Error, match=told):
            reconstruct(net, data(), **{"bits": 2, **wrong})
    with pytest.raises(Error, match="at least one batch"):
        reconstruct(net, [], **GRID)
    tied: Any = network(blocks=2)
    tied[1].up.weight = tied[0].up.weight
    with pytest.raises(Error, match="several names"):
        reconstruct(tied, data(), **GRID)
    outside = nn.Sequential(nn.Linear(12, 12), network())
    with pytest.raises(Error, match="stands in a block"):
        reconstruct(outside, data(), pattern="0.weight", blocks="1", **GRID)
    with pytest.warns(UserWarning, match=r"leaves 0\.weight as they are"):
        reconstruct(outside, data(), pattern=["0.weight", "1.0.up.weight"], blocks="1", steps=2, **GRID)
    found = reconstruct(network(), data(), steps=2, grid=Integer(bits=2, group=6))
    assert found["0.up.weight_scale"].shape == (24, 2)
