"""Paths, barriers and planes of checkpoints: known functions, and corners where they should be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.landscape import barrier, line, path, plane_through, trajectory
from weightsmith.stats import batch_norm


class Point(nn.Module):
    """Three numbers."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def at(*place: float) -> dict[str, torch.Tensor]:
    return {"at": torch.tensor([*place, *[0.0] * (3 - len(place))], dtype=torch.float64)}


def seen(model: Point) -> dict[str, torch.Tensor]:
    return {"loss": model.at.square().sum(), "x": model.at[0], "y": model.at[1]}


def test_path_goes_straight_from_corner_to_corner():
    found = path(Point(), [at(0), at(1, 0), at(1, 2)], seen, steps=3)
    assert found["at"] == [0, 0.25, 0.5, 0.75, 1]
    assert found["x"] == [0, 0.5, 1, 1, 1]
    assert found["y"] == [0, 0, 0, 1, 2]
    two = path(Point(), [at(0), at(1)], seen, steps=3)
    assert two["x"] == [0, 0.5, 1]


def test_path_along_a_bezier_curve():
    corners = [at(0, 0), at(1, 2), at(3, 0)]
    found = path(Point(), corners, seen, curve="bezier", steps=5)
    for t, x, y in zip(found["at"], found["x"], found["y"], strict=True):
        assert x == pytest.approx(2 * t * (1 - t) * 1 + t * t * 3)
        assert y == pytest.approx(2 * t * (1 - t) * 2)
    cubic = path(Point(), [*corners, at(0, 5)], seen, curve="bezier", steps=3)
    assert cubic["y"][1] == pytest.approx((0 + 3 * 2 + 3 * 0 + 5) / 8)


def test_path_refuses_and_resumes(tmp_path):
    with pytest.raises(Error, match="at least 2 checkpoints"):
        path(Point(), [at(0)], seen)
    with pytest.raises(Error, match="curve is one of"):
        path(Point(), [at(0), at(1)], seen, curve="spline")  # type: ignore[arg-type]
    calls = []

    def counted(model: Point) -> torch.Tensor:
        calls.append(1)
        return model.at.sum()

    for _ in range(2):
        path(Point(), [at(0), at(1), at(2)], counted, steps=3, resume=tmp_path / "p.json")
    assert len(calls) == 5


def test_barrier_is_the_highest_rise_above_the_ends():
    # along x from -1 to 2 the loss (x^2 - 1)^2 + x rises most above the line between -1 and 11
    found = barrier(Point(), at(-1), at(2), lambda m: (m.at[0] ** 2 - 1) ** 2 + m.at[0], steps=301)
    rises = {t: ((-1 + 3 * t) ** 2 - 1) ** 2 + (-1 + 3 * t) - (-1 + 12 * t) for t in found["at"]}
    best = max(rises, key=rises.__getitem__)
    assert found["barrier"] == pytest.approx(rises[best])
    assert found["barrier at"] == best
    assert (found["loss at 0"], found["loss at 1"]) == (-1.0, 11.0)
    convex = barrier(Point(), at(-1), at(3), lambda m: m.at.square().sum())
    assert convex["barrier"] == 0.0
    same = barrier(Point(), at(1), at(1), lambda m: m.at.square().sum(), steps=3)
    assert same["barrier"] == 0.0


def test_barrier_of_the_error_and_of_what_is_not_finite():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    ends = [{n: torch.randn_like(v) for n, v in net.state_dict().items()} for _ in range(2)]
    x, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    found = barrier(net, *ends, None, [(x, y)], steps=5)
    errors = []
    for t in found["at"]:
        mixed = {n: (1 - t) * ends[0][n] + t * ends[1][n] for n in ends[0]}
        errors.append(float((torch.func.functional_call(net, mixed, x).argmax(1) != y).float().mean()))
    rise = [e - (1 - t) * errors[0] - t * errors[-1] for t, e in zip(found["at"], errors, strict=True)]
    assert found["barrier of error"] == pytest.approx(max(rise))
    broken = barrier(Point(), at(-1), at(1), lambda m: (m.at[0] ** 2 - 0.5).log(), steps=3)
    assert broken["barrier"] == 0.0
    assert "not finite" in broken.notes[0]


def test_a_barrier_with_batch_norm_wants_its_statistics_anew():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randint(0, 3, (200,))
    nets = []
    for _ in range(2):
        net = nn.Sequential(
            nn.Linear(5, 16, bias=False), nn.BatchNorm1d(16, momentum=None), nn.ReLU(), nn.Linear(16, 3)
        )
        net(x)
        nets.append(net.eval())
    before = copy.deepcopy(nets[0].state_dict())
    mixed = barrier(nets[0], nets[0], nets[1], None, [(x, y)], steps=3)
    anew = barrier(nets[0], nets[0], nets[1], None, [(x, y)], steps=3, recalibrate=[x])
    middle = {n: (nets[0].state_dict()[n] + nets[1].state_dict()[n]) / 2
              for n in before if not n.endswith("tracked")}  # fmt: skip
    by_hand = copy.deepcopy(nets[0])
    by_hand.load_state_dict(middle, strict=False)
    kept = torch.nn.functional.cross_entropy(by_hand(x), y)
    assert mixed["loss"][1] == pytest.approx(float(kept.detach()), rel=1e-5)
    batch_norm(by_hand, [x]).load_into(by_hand, strict=False)
    right = torch.nn.functional.cross_entropy(by_hand(x), y)
    assert anew["loss"][1] == pytest.approx(float(right.detach()), rel=1e-5)
    assert anew["loss"][1] != pytest.approx(mixed["loss"][1], rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in nets[0].state_dict().items())


def test_plane_through_three_shows_true_distances():
    corners = [at(1, 1, 1), at(4, 5, 1), at(1, 1, 3)]
    target = torch.tensor([4.0, 5.0, 1.0])

    def loss(model: Point) -> torch.Tensor:
        return (model.at - target).square().sum()

    found = plane_through(Point(), corners, loss, steps=11, margin=0.0)
    assert found["checkpoints"] == [[0, 0], [5, 0], [0, pytest.approx(2)]]
    for row in found.table:  # the loss is the squared distance from the second corner
        assert row["loss"] == pytest.approx((row["x"] - 5) ** 2 + row["y"] ** 2)
    slanted = plane_through(Point(), [at(0), at(2), at(1, 3)], lambda m: m.at.sum(), steps=3)
    assert slanted["checkpoints"] == [[0, 0], [2, 0], [1, 3]]
    assert slanted.plots[0].lines[0].x == [0, 2, 1]
    assert min(slanted["x"]) == pytest.approx(-0.4)


def test_plane_through_refuses():
    with pytest.raises(Error, match="3 checkpoints, got 2"):
        plane_through(Point(), [at(0), at(1)], seen)
    for row in ([at(0), at(1), at(2)], [at(1), at(1), at(2)]):
        with pytest.raises(Error, match="on one line"):
            plane_through(Point(), row, seen)
    with pytest.raises(Error, match="margin"):
        plane_through(Point(), [at(0), at(1), at(0, 1)], seen, margin=-1)


def test_trajectory_lies_in_its_plane():
    run = [at(8 * 0.5**i, (-1) ** i * 0.5**i) for i in range(6)]

    def loss(model: Point) -> torch.Tensor:
        return model.at.square().sum()

    found = trajectory(Point(), run, loss, steps=9)
    assert found["explained by x"] + found["explained by y"] == pytest.approx(1)
    assert found["explained by x"] > 0.9
    last = run[-1]["at"]
    for (x, y), one in zip(found["checkpoints"], run, strict=True):
        assert math.hypot(x, y) == pytest.approx(float((one["at"] - last).norm()))
    # the plane is that of the first two numbers: the least loss in it is near 0
    assert found["least loss"] < 1.0
    assert "shadow" in found.notes[-1]
    found.draw()


def test_the_model_itself_may_be_a_checkpoint_or_a_direction():
    torch.manual_seed(0)
    net, other = nn.Linear(4, 3), nn.Linear(4, 3)
    batch = (torch.randn(20, 4), torch.randint(0, 3, (20,)))
    apart = copy.deepcopy(net)
    for at_once in (1, 5):
        own = path(net, [net, other, net], None, [batch], steps=4, at_once=at_once)
        assert own["loss"] == pytest.approx(path(net, [apart, other, apart], None, [batch], steps=4)["loss"])
        longer = line(net, None, [batch], direction=dict(net.named_parameters()), steps=5, at_once=at_once)
        given = line(net, None, [batch], direction=apart.state_dict(), steps=5)
        assert longer["loss"] == pytest.approx(given["loss"])


def test_a_path_of_pieces_recalibrates_from_what_is_read_once():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)) for _ in range(3)]
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    once = path(nets[0], nets, None, [(x, y)], steps=3, recalibrate=iter([x[:20], x[20:]]))
    often = path(nets[0], nets, None, [(x, y)], steps=3, recalibrate=[x[:20], x[20:]])
    assert once["loss"] == often["loss"]
