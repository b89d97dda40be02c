"""An average that grows along a run: state, steps, and what comes out."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.average import Info, State, init, lift, step
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.weights import Weights

kernel = ws.average.swa.kernel


def moment(value: float, count: int = 0) -> dict[str, Tensor]:
    return {"w": torch.full((2, 2), value), "b": torch.full((2,), -value), "n": torch.tensor(count)}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_the_mean_of_all_moments():
    average = ws.average.swa()
    for value in (1.0, 2.0, 6.0):
        average.update(moment(value))
    assert torch.equal(average.weights()["w"], torch.full((2, 2), 3.0))
    assert torch.equal(average.weights()["b"], torch.full((2,), -3.0))


def test_what_holds_no_floats_is_that_of_the_last_moment():
    average = ws.average.swa()
    for count in (5, 9, 7):
        average.update(moment(1.0, count) | {"mask": torch.tensor([count > 5])})
    assert average.weights()["n"] == 7
    assert average.weights()["mask"].item() is True


def test_what_is_told_of_a_step():
    average = ws.average.swa()
    assert average.update(moment(1.0)) == Info(1, 0.0)
    # The mean goes from 1 to 2 in six places.
    assert average.update(moment(3.0)) == Info(2, pytest.approx(6**0.5))
    assert average.update(moment(2.0)) == Info(3, 0.0)


def test_nothing_yet():
    with pytest.raises(Error, match=r"there is no average yet: call update\(model\) first"):
        ws.average.swa().weights()


# What is remembered


def test_the_model_can_move_on_without_touching_the_average():
    module = nn.Linear(2, 2)
    average = ws.average.swa()
    average.update(module)
    first = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.fill_(100.0)
    assert torch.equal(average.weights()["weight"], first)
    average.update(module)
    with torch.no_grad():
        module.weight.zero_()
    torch.testing.assert_close(average.weights()["weight"], (first + 100) / 2)
    assert not average.weights()["weight"].requires_grad


def test_counters_can_move_on_too():
    """A counter of the model is copied, also at later steps."""
    model = moment(1.0, 3)
    state = init(model)
    model["n"].fill_(99)
    assert state.kept["n"] == 3
    state, _ = step(kernel, state, model)
    model["n"].fill_(0)
    assert state.kept["n"] == 99


def test_a_step_does_not_change_the_state_that_went_in():
    state = init(moment(1.0))
    before = copy.deepcopy(state)
    after, info = step(kernel, state, moment(5.0))
    assert (state.count, after.count, info.count) == (1, 2, 2)
    assert all(torch.equal(state.kept[name], before.kept[name]) for name in before.kept)
    again, _ = step(kernel, state, moment(5.0))
    assert all(torch.equal(again.kept[name], after.kept[name]) for name in after.kept)


def test_what_was_read_earlier_does_not_change_later():
    average = ws.average.swa()
    average.update(moment(1.0))
    early = average.weights()
    average.update(moment(3.0))
    assert torch.equal(early["w"], torch.full((2, 2), 1.0))


def test_narrow_floats_are_kept_in_float32_and_rounded_once():
    """In bfloat16 a mean near 256 could not move by 1/3."""
    average = ws.average.swa()
    for value in (256.0, 256.0, 258.0, 258.0, 258.0, 258.0):
        average.update({"w": torch.tensor([value]).bfloat16(), "d": torch.tensor([value]).double()})
    assert average.state is not None
    assert average.state.kept["w"].dtype == torch.float32
    assert average.state.kept["d"].dtype == torch.float64
    found = average.weights()
    assert (found.spec("w").dtype, found.spec("d").dtype) == (torch.bfloat16, torch.float64)
    assert average.state.kept["w"].item() == pytest.approx(257 + 1 / 3)
    assert found["w"].item() == 258
    assert found["d"].item() == pytest.approx(257 + 1 / 3)


def test_tied_parameters_share_one_shadow():
    module, average = Tied(), ws.average.swa()
    average.update(module)
    first = module.embed.weight.detach().clone()
    with torch.no_grad():
        module.embed.weight.add_(1)
    info = average.update(module)
    assert info.moved == pytest.approx((15 * 0.25) ** 0.5, rel=1e-5)  # counted once
    assert average.state is not None
    assert average.state.kept["embed.weight"] is average.state.kept["head.weight"]
    found = average.weights()
    assert found.ties == {"head.weight": "embed.weight"}
    torch.testing.assert_close(found["head.weight"], first + 0.5)
    target = Tied()
    found.load_into(target)
    assert target.head.weight is target.embed.weight
    torch.testing.assert_close(target.embed.weight, first + 0.5)


def test_going_on_from_a_saved_state():
    values = (1.0, 5.0, 2.0, 8.0)
    whole, part = ws.average.swa(), ws.average.swa()
    for value in values:
        whole.update(moment(value))
    for value in values[:2]:
        part.update(moment(value))
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed = ws.average.swa()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for value in values[2:]:
        resumed.update(moment(value))
    assert all(torch.equal(resumed.weights()[name], whole.weights()[name]) for name in whole.weights())


def test_ties_and_dtypes_survive_a_saved_state():
    module = Tied().bfloat16()
    average = ws.average.swa()
    average.update(module)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    resumed = ws.average.swa()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.update(module)
    assert resumed.weights().ties == {"head.weight": "embed.weight"}
    assert resumed.weights().spec("head.weight").dtype == torch.bfloat16


def test_an_average_that_has_not_begun_has_no_state():
    average = ws.average.swa()
    assert average.state_dict() == {}
    average.load_state_dict({})
    assert average.state is None


# What does not fit


def test_other_tensors_than_before():
    average = ws.average.swa()
    average.update({"a": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(Error, match=r"swa needs the same tensors at every step: the second lacks b"):
        average.update({"a": torch.ones(2)})
    with pytest.raises(Error, match=r"a was \[2\] and is \[3\] now"):
        average.update({"a": torch.ones(3), "b": torch.ones(1)})
    assert average.state is not None
    assert average.state.count == 1


def test_an_unknown_option():
    with pytest.raises(Error, match="swa has no option 'decay'; it has none"):
        ws.average.swa(decay=0.9)


# In company


def test_files_and_other_weights_are_moments_too(tmp_path: Path):
    """Checkpoints of a finished run can be averaged as well."""
    for value in (1.0, 3.0):
        Weights.of(moment(value)).save(tmp_path / f"{value}.safetensors")
    average = ws.average.swa()
    for path in sorted(tmp_path.glob("*.safetensors")):
        average.update(path)
    average.update(0.5 * Weights.of(moment(4.0)).select(["w", "b"]) | {"n": torch.tensor(0)})
    assert torch.equal(average.weights()["w"], torch.full((2, 2), 2.0))


def test_saved_with_a_lineage(tmp_path: Path):
    average = ws.average.swa()
    average.update(moment(1.0))
    average.update(moment(2.0))
    average.weights().save(tmp_path / "mean.safetensors")
    record = ws.open(tmp_path / "mean.safetensors").lineage.record()["made"]
    assert (record["method"], record["options"]) == ("average.swa", {"count": 2})
    assert "inputs" not in record


def test_an_average_of_ones_own_with_options():
    @card(paper="p")
    def decayed(mean: Tensor, weight: Tensor, count: int, *, decay: float = 0.5) -> Tensor:
        return mean * decay + weight * (1 - decay)

    ema = lift(decayed)
    average = ema(decay=0.75)
    for value in (0.0, 4.0, 4.0):
        average.update(moment(value))
    assert average.weights()["w"][0, 0].item() == 1.75
    assert average.weights().lineage.options == {"count": 3, "decay": 0.75}
    assert ema(torch.tensor([0.0]), torch.tensor([4.0]), 1, decay=0.75).tolist() == [1]  # type: ignore[comparison-overlap]
    state, _ = step(decayed, init(moment(0.0)), moment(4.0), decay=0.25)
    assert isinstance(state, State)
    assert state.kept["w"][0, 0] == 3


def test_what_a_user_sees():
    assert ws.average.swa(torch.tensor([2.0]), torch.tensor([5.0]), count=2).tolist() == [3]  # type: ignore[union-attr]
    assert list(inspect.signature(ws.average.swa).parameters) == []
    assert ws.average.swa.__name__ == "swa"
