"""A recorder beside a training loop, against the figures written out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.stats import Recorder
from weightsmith.stats._record import FIGURES


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)


def train(model: nn.Module, steps: int, recorder: Recorder | None = None, first: int = 0, optimizer=None):
    """A plain loop; returns the weights before and after every step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    for step in range(first, first + steps):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs.to(next(model.parameters()))).square().sum().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        with torch.no_grad():
            model[0].weight[:, 0] = 0
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        seen.append((before, after, gradients))
        if recorder is not None:
            recorder.step()
    return seen


@pytest.mark.parametrize("every", [1, 2, 3])
def test_figures_are_those_of_the_step(every):
    model = network()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    recorder = Recorder(model, every=every)
    seen = train(model, 6, recorder)
    assert [row["step"] for row in recorder.rows[:: len(start)]] == list(range(every, 7, every))
    last = start
    for row in recorder.rows:
        before, after, gradients = (part[row["tensor"]].double() for part in seen[row["step"] - 1])
        assert row["norm"] == pytest.approx(float(after.norm()), rel=1e-5)
        assert row["gradient norm"] == pytest.approx(float(gradients.norm()), rel=1e-5)
        assert row["update"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert row["sparsity"] == pytest.approx(float((after == 0).double().mean()))
        old = seen[row["step"] - 1 - every][1] if row["step"] > every else last
        flips = ((old[row["tensor"]] > 0) != (after > 0)).double().mean()
        assert row["sign flips"] == pytest.approx(float(flips))
    assert any(row["sign flips"] > 0 for row in recorder.rows)
    assert any(row["sparsity"] > 0 for row in recorder.rows)


def test_the_run_is_not_disturbed():
    alone, watched = network(), network()
    train(alone, 4)
    train(watched, 4, Recorder(watched))
    for a, b in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


def test_a_run_is_taken_up_again(tmp_path):
    whole_model, model = network(), network()
    whole = Recorder(whole_model, every=2, path=tmp_path / "whole.jsonl")
    train(whole_model, 8, whole)
    first = Recorder(model, every=2, path=tmp_path / "part.jsonl")
    train(model, 5, first)
    saved = tmp_path / "state.pt"
    torch.save({"model": model.state_dict(), "recorder": first.state_dict()}, saved)
    train(model, 3, first, first=5)  # steps that the checkpoint does not know of
    state = torch.load(saved)
    again = network()
    again.load_state_dict(state["model"])
    second = Recorder(again, every=2, path=tmp_path / "part.jsonl")
    second.load_state_dict(state["recorder"])
    train(again, 3, second, first=5)
    assert second.rows == whole.rows
    assert (tmp_path / "part.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_lines_of_json(tmp_path):
    model = network()
    recorder = Recorder(model, figures=("sparsity", "norm"), pattern="*.weight", path=tmp_path / "r.jsonl")
    recorder.step()
    recorder.step()
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert rows == recorder.rows
    assert [list(row) for row in rows] == [["step", "tensor", "norm", "sparsity"]] * 4


def test_no_gradient_and_no_length_are_none():
    layer = nn.Linear(2, 1)
    nn.init.zeros_(layer.weight)
    layer.bias.grad = torch.tensor([math.inf])
    recorder = Recorder(layer)
    recorder.step()
    weight, bias = recorder.rows
    assert weight["gradient norm"] is None
    assert weight["update"] is None  # zero over zero
    assert weight["sparsity"] == 1.0
    assert bias["gradient norm"] is None
    assert bias["update"] == 0.0


def test_halves_do_not_overflow_and_doubles_stay():
    layer = nn.Linear(4, 1, bias=False, dtype=torch.float16)
    nn.init.constant_(layer.weight, 60000.0)
    both = nn.ModuleDict({"narrow": layer, "wide": nn.Linear(1, 1, bias=False, dtype=torch.float64)})
    nn.init.constant_(both["wide"].weight, 1 + 2.0**-40)
    recorder = Recorder(both, figures=("norm",))
    recorder.step()
    assert recorder.rows[0]["norm"] == 2 * layer.weight[0, 0].item()  # above what float16 holds
    assert recorder.rows[1]["norm"] == 1 + 2.0**-40


def test_what_is_not_asked_for_is_not_held():
    recorder = Recorder(network(), figures=("norm",))
    assert recorder._before is None
    assert not recorder._signs
    seldom = Recorder(network(), every=3)
    held = []
    for _ in range(6):
        seldom.step()
        held.append(seldom._before is not None)
    assert held == [False, True, False, False, True, False]


def test_tied_parameters_are_one_row():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    recorder = Recorder(model)
    recorder.step()
    assert [row["tensor"] for row in recorder.rows] == ["0.weight"]


def test_a_report():
    model = network()
    recorder = Recorder(model)
    with pytest.raises(Error, match="at least one record"):
        recorder.report()
    train(model, 3, recorder)
    found = recorder.report()
    assert len(found.table) == 12
    assert [plot.title for plot in found.plots] == [figure.capitalize() for figure in FIGURES]
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert found["last norm"] == pytest.approx(float(weights.norm()), rel=1e-5)
    last = [row["update"] for row in recorder.rows[-4:]]
    assert found["last update"] == pytest.approx(sum(last) / 4)
    assert found["last sparsity"] == pytest.approx(float((weights == 0).double().mean()))
    assert "0.weight" in str(found)


def test_refusals():
    model = network()
    with pytest.raises(Error, match=r"nrom.*norm"):
        Recorder(model, figures=("nrom",))
    with pytest.raises(Error, match="nothing"):
        Recorder(model, figures=())
    with pytest.raises(Error, match="every"):
        Recorder(model, every=0)
    with pytest.raises(Error, match="fits"):
        Recorder(model, pattern="none")
    recorder = Recorder(model)
    with pytest.raises(Error, match="this state is of norm"):
        recorder.load_state_dict(Recorder(model, figures=("norm",)).state_dict())
    with pytest.raises(Error, match="another model"):
        recorder.load_state_dict(Recorder(nn.Linear(2, 2)).state_dict())
