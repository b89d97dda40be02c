"""Lines and planes: known functions, and the invariance that filter normalisation is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect.landscape import line, plane, random_direction


class Point(nn.Module):
    """Two numbers."""

    def __init__(self, x: float = 0.0, y: float = 0.0):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))


ALONG, ACROSS = {"at": torch.tensor([1.0, 0.0])}, {"at": torch.tensor([0.0, 1.0])}


def test_line_follows_the_function():
    net = Point(1.0, 5.0)
    found = line(net, lambda m: m.at[0] ** 3, direction={"at": torch.tensor([2.0, 0.0])}, span=(-1, 3), steps=9)
    assert found["at"] == [-1 + i / 2 for i in range(9)]
    assert found["loss"] == pytest.approx([(1 + 2 * t) ** 3 for t in found["at"]])
    assert found["least loss"] == -1.0
    assert found["least at"] == -1.0
    assert found["most at"] == 3.0
    # second differences of the cube at 0, 1, ... 6: one bends down at (below) zero
    assert found["share convex"] == 1.0
    down = line(net, lambda m: -m.at[0].square(), direction=ALONG, steps=5)
    assert down["share convex"] == 0.0
    for sign in (1, -1):  # bends do not hang on the height
        lifted = line(net, lambda m, sign=sign: sign * (m.at[0].square() - 100), direction=ALONG, steps=5)
        assert lifted["share convex"] == (sign > 0)
    assert net.at.tolist() == [1.0, 5.0]
    assert found.plots[0].lines[0].y == found["loss"]
    str(found)


def test_line_starts_elsewhere_and_says_what_is_not_finite():
    net = Point()
    found = line(net, lambda m: m.at[0].log(), direction=ALONG, origin={"at": torch.tensor([1.0, 0.0])}, steps=3)
    assert found["loss"][1:] == pytest.approx([0.0, math.log(2)])
    assert found["loss"][0] == -math.inf
    assert "At 1 of 3 points" in found.notes[0]
    assert found["least loss"] == 0.0
    assert found.to_json()["table"][0]["loss"] is None


def test_line_takes_a_random_direction():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    batch = (torch.randn(20, 4), torch.randint(0, 3, (20,)))
    found = line(net, None, [batch], steps=5, seed=7)
    given = line(net, None, [batch], steps=5, direction=random_direction(net, seed=7))
    assert found["loss"] == given["loss"]
    assert found["error"] == given["error"]
    assert found["loss"] != line(net, None, [batch], steps=5, seed=8)["loss"]
    elsewhere = {name: 2 * value for name, value in net.state_dict().items()}
    moved = line(net, None, [batch], steps=5, seed=7, origin=elsewhere)
    copied = nn.Linear(4, 3)
    copied.load_state_dict(elsewhere)
    assert moved["loss"] == pytest.approx(line(copied, None, [batch], steps=5, seed=7)["loss"])


def rescalable(factor: float) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-14), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    x = torch.randn(32, 1, 6, 6, dtype=torch.float64)
    net(x)  # some running statistics
    with torch.no_grad():
        net[0].weight *= factor
        net[1].running_mean *= factor
        net[1].running_var *= factor**2
    return net


def test_a_rescaled_layer_changes_plain_curves_and_not_normalised_ones():
    x = torch.randn(32, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))
    curves = {}
    for factor in (1.0, 10.0):
        net = rescalable(factor)
        for scale in ("filter", "none"):
            way = random_direction(net, seed=1, scale=scale).select("0.weight")
            for recalibrate in (None, [x]):
                found = line(net, None, [(x, y)], direction=way, steps=7, recalibrate=recalibrate)
                curves[scale, recalibrate is None, factor] = torch.tensor(found["loss"])
    for kept in (True, False):
        torch.testing.assert_close(curves["filter", kept, 1.0], curves["filter", kept, 10.0], rtol=0, atol=1e-9)
        assert float((curves["none", kept, 1.0] - curves["none", kept, 10.0]).abs().max()) > 1e-2


def test_plane_is_the_function_on_a_grid():
    net = Point(1.0, 2.0)
    found = plane(
        net, lambda m: m.at[0] + 10 * m.at[1], directions=(ALONG, ACROSS), span=(-1, 1), across=(0, 3), steps=(3, 4)
    )
    expected = [[(1 + x) + 10 * (2 + y) for x in (-1, 0, 1)] for y in (0, 1, 2, 3)]
    assert found.plots[0].surface.z == expected
    assert found.plots[-1].surface.style == "contour"
    assert [(row["x"], row["y"]) for row in found.table[:4]] == [(-1, 0), (0, 0), (1, 0), (-1, 1)]
    assert (found["least loss"], found["least at"], found["most loss"]) == (20, [-1, 0], 52)
    assert net.at.tolist() == [1.0, 2.0]


def test_plane_counts_negative_curvature():
    cases = {
        0.0: lambda m: m.at.square().sum() + 1.5 * m.at.prod(),
        1.0: lambda m: m.at.square().sum() + 2.5 * m.at.prod(),  # bends down between the axes only
    }
    for share, loss in cases.items():
        found = plane(Point(), loss, directions=(ALONG, ACROSS), steps=7)
        assert found["share with negative curvature"] == share
    # x^3 bends down left of 0: at three of seven inner places, and not at 0 itself
    cube = plane(Point(), lambda m: m.at[0] ** 3, directions=(ALONG, ACROSS), steps=9)
    assert cube["share with negative curvature"] == pytest.approx(3 / 7)
    stretched = plane(Point(), lambda m: m.at.square().sum() + 3 * m.at.prod(), directions=(ALONG, ACROSS),
                      steps=(7, 5), span=(-1, 1), across=(-9, 2))  # fmt: skip
    assert stretched["share with negative curvature"] == 1.0
    tiny = plane(Point(), lambda m: m.at.sum(), directions=(ALONG, ACROSS), steps=2)
    assert math.isnan(tiny["share with negative curvature"])


def test_plane_takes_two_random_directions():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    batch = (torch.randn(20, 4), torch.randint(0, 3, (20,)))
    found = plane(net, None, [batch], steps=3, seed=4)
    given = plane(
        net, None, [batch], steps=3, directions=(random_direction(net, seed=4), random_direction(net, seed=5))
    )
    assert found["loss"] == given["loss"]
    assert {plot.title for plot in found.plots} == {
        "Loss over a plane: loss", "Loss over a plane: error", "Loss over a plane: contours of loss"}  # fmt: skip
    found.draw()


def test_plane_refuses():
    with pytest.raises(Error, match="2 directions"):
        plane(Point(), lambda m: m.at.sum(), directions=(ALONG,))  # type: ignore[arg-type]
    with pytest.raises(Error, match="at least 2 steps"):
        plane(Point(), lambda m: m.at.sum(), steps=1)
    with pytest.raises(Error, match="rising"):
        line(Point(), lambda m: m.at.sum(), span=(1, 1))
