"""Bases that are what they promise, edges by their definition, and two networks side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.inspect import interactions, modularity


def stages(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, 4)]
    return [layer.double() for layer in layers]


INPUTS = torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def activations(chain):
    found, value = [], INPUTS
    for stage in chain:
        value = stage(value)
        found.append(value.detach())
    return found


@pytest.mark.parametrize("basis", ["interaction", "principal", "neuron"])
def test_coordinates_steps_and_edges(basis):
    chain = stages()
    found = interactions(chain, INPUTS, basis=basis)
    layers = activations(chain)
    for layer, directions, steps in zip(layers, found.bases, found.steps, strict=True):
        coordinates = (layer - layer.mean(0)) @ directions
        deviations = coordinates.square().mean(0).sqrt()
        if basis != "neuron":
            covariance = coordinates.T @ coordinates / len(layer)
            assert (covariance - covariance.diag().diag()).abs().max() < 1e-9
        torch.testing.assert_close(steps @ directions, deviations.diag(), rtol=1e-6, atol=1e-9)
        if directions.shape[0] == directions.shape[1]:  # the next layer sees all of this one
            torch.testing.assert_close(layer.mean(0) + (coordinates / deviations) @ steps, layer, rtol=1e-6, atol=1e-8)
    for index, edge in enumerate(found.edges):
        total = torch.zeros_like(edge)
        for one in layers[index]:
            jacobian = torch.autograd.functional.jacobian(chain[index + 1], one)
            total += (found.bases[index + 1].T @ jacobian @ found.steps[index].T).square()
        torch.testing.assert_close(edge, total / len(INPUTS))


def test_the_interaction_basis_makes_the_jacobians_orthogonal_and_as_large_as_its_coordinates():
    chain = stages()
    found = interactions(chain, INPUTS)
    for index, layer in enumerate(activations(chain)[:-1]):
        gram = torch.zeros(len(found.steps[index]), len(found.steps[index]), dtype=torch.float64)
        for one in layer:
            jacobian = torch.autograd.functional.jacobian(chain[index + 1], one)
            moved = found.bases[index + 1].T @ jacobian @ found.steps[index].T
            gram += moved.T @ moved / len(layer)
        coordinates = (layer - layer.mean(0)) @ found.bases[index]
        torch.testing.assert_close(gram, coordinates.square().mean(0).diag(), rtol=1e-6, atol=1e-9)


def test_it_does_not_depend_on_how_a_layer_is_written():
    chain = stages()
    turn = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    back = torch.linalg.inv(turn)
    other = [lambda x: chain[0](x) @ turn, lambda x: chain[1](x @ back), chain[2]]
    one, two = interactions(chain, INPUTS), interactions(other, INPUTS)
    for left, right in zip(one.edges, two.edges, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9)
    assert interactions(chain, INPUTS, basis="principal").modularity != pytest.approx(
        interactions(other, INPUTS, basis="principal").modularity, abs=1e-6
    )


def test_null_directions_are_dropped():
    chain = stages()
    with torch.no_grad():
        chain[1][0].weight[:, 0] = 0  # a unit that nobody reads
        chain[0][0].weight[1], chain[0][0].bias[1] = chain[0][0].weight[2], chain[0][0].bias[2]
    found = interactions(chain, INPUTS)
    assert found.bases[0].shape == (5, 3)
    assert interactions(chain, INPUTS, basis="principal").bases[0].shape == (5, 4)


def test_two_networks_side_by_side_are_two_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shapes = ((3, 5), (5, 7), (7, 4))
        pairs = [[nn.Sequential(nn.Linear(*shape), nn.Tanh()).double() for _ in range(2)] for shape in shapes]
    found = interactions([side_by_side(*pair) for pair in pairs], INPUTS)
    parts = [torch.zeros(basis.shape[1]) for basis in found.bases]
    for part, basis in zip(parts, found.bases, strict=True):
        half = len(basis) // 2
        share = basis[:half].square().sum(0) / basis.square().sum(0)
        part.copy_((share > 0.5).float())
    across = [float(edge[parts[i + 1] == 0][:, parts[i] == 1].sum() / edge.sum()) for i, edge in enumerate(found.edges)]
    assert max(across) < 0.01
    assert found.modularity >= 0.4


def side_by_side(one, other):
    """Two networks, each on half of the values."""

    def both(values):
        halves = values.chunk(2, dim=1)
        return torch.cat([one(halves[0]), other(halves[1])], dim=1)

    return both


def test_report_and_refusals(tmp_path):
    pytest.importorskip("matplotlib")
    found = interactions(stages(), INPUTS)
    report = found.report()
    assert report.figures["modularity"] == found.modularity
    assert [row["width"] for row in found.rows()] == [5, 7, 4]
    assert len(found.to_json()["edges"]) == 2
    assert report.save(tmp_path / "r.html").exists()
    assert found.modularity == pytest.approx(modularity_of(found))
    with pytest.raises(Error, match="2 stages"):
        interactions(stages()[:1], INPUTS)
    with pytest.raises(Error, match="basis is"):
        interactions(stages(), INPUTS, basis="other")  # type: ignore[arg-type]
    with pytest.raises(Error, match="layer 1 does not change"):
        interactions([nn.Identity(), lambda x: torch.zeros_like(x)], INPUTS)


def modularity_of(found):
    sizes = [len(part) for part in found.parts]
    whole = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    whole[sizes[0] : sum(sizes[:2]), : sizes[0]] = found.edges[0]
    whole[sum(sizes[:2]) :, sizes[0] : sum(sizes[:2])] = found.edges[1]
    return modularity(whole + whole.T)[0]


def test_activations_that_are_not_finite_are_refused():
    with pytest.raises(Error, match="layer 1 has activations that are not finite"):
        interactions([nn.Identity(), lambda x: x / 0], INPUTS)
