"""What pruning has changed, against running the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.inspect import pruning


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False))
    for index, parameter in enumerate(made.parameters()):
        parameter.data = normal(*parameter.shape, seed=index)
    return made


@pytest.mark.parametrize("form", ["full", "diagonal", "blocks"])
def test_the_change_of_outputs_is_what_the_layer_gives_on_the_data(form: str):
    layer, inputs = nn.Linear(6, 5, bias=False), normal(40, 6, seed=3)
    if form != "full":
        inputs = torch.linalg.qr(inputs)[0] * torch.arange(1.0, 7)  # inputs that do not go together
    gram = ws.stats.gram(layer, [inputs])["weight"]
    form_of = {"full": gram, "diagonal": gram.diagonal(), "blocks": torch.stack([gram[:3, :3], gram[3:, 3:]])}
    after = ws.prune.magnitude(layer, 0.5)
    found = pruning(layer, after, stats={"weight": form_of[form]})
    expected = (inputs @ (after["weight"] - layer.weight).T).norm() / (inputs @ layer.weight.T).norm()
    assert found.table[0]["output change"] == pytest.approx(float(expected), rel=1e-4)
    assert found.figures["output change"] == pytest.approx(float(expected), rel=1e-4)


def test_zeros_rows_inputs_and_bytes_by_hand():
    before = {"h.0.q.weight": normal(4, 8).bfloat16(), "h.1.q.weight": normal(4, 8, seed=1).bfloat16()}
    after = {name: value.clone() for name, value in before.items()}
    after["h.0.q.weight"][1] = 0
    after["h.0.q.weight"][:, :3] = 0
    found = pruning(before, after)
    first, second = found.table
    assert first["zeros"] == (8 + 3 * 3) / 32
    assert (first["rows gone"], first["inputs gone"]) == (1, 3)
    assert (first["bytes"], first["packed bytes"]) == (64, (32 - 17) * 2 + 4)
    assert (second["zeros"], second["change"], second["packed bytes"]) == (0, 0, 68)
    change = (after["h.0.q.weight"] - before["h.0.q.weight"]).float().norm() / before["h.0.q.weight"].float().norm()
    assert first["change"] == pytest.approx(float(change), rel=1e-5)
    assert found.figures["zeros"] == 17 / 64
    assert found.figures["output change"] is None


def test_data_of_some_matrices_under_any_of_their_names():
    layer, inputs = nn.Linear(5, 5, bias=False), normal(30, 5, seed=2)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(5, 3, bias=False)})
    gram = ws.stats.gram(layer, [inputs])["weight"]
    after = ws.prune.magnitude(model, 0.5)
    found = pruning(model, after, stats={"b.weight": gram})
    expected = (inputs @ (after["a.weight"] - layer.weight).T).norm() / (inputs @ layer.weight.T).norm()
    assert [row["output change"] for row in found.table] == [pytest.approx(float(expected), rel=1e-4), None]
    assert found.figures["output change"] == pytest.approx(float(expected), rel=1e-4)


def test_what_is_no_number_is_not_left_out_of_the_figures():
    before = {"a.weight": normal(3, 4), "b.weight": normal(3, 4, seed=1)}
    after = before | {"b.weight": torch.full((3, 4), float("nan"))}
    found = pruning(before, after, stats={"a.weight": torch.ones(4)})
    assert found.table[0]["change"] == 0
    assert found.table[1]["change"] is None
    assert found.figures["change"] is None
    assert found.figures["output change"] == 0
    assert found.figures["zeros"] == 0


def test_what_does_not_fit_is_said():
    with pytest.raises(Error, match="and after pruning it is not there"):
        pruning({"w": normal(2, 2)}, {"v": normal(2, 2)})
    with pytest.raises(Error, match="stats say nothing of w; they are of v"):
        pruning({"w": normal(2, 2)}, {"w": normal(2, 2)}, stats={"v": torch.ones(2)})
    with pytest.raises(Error, match=r"stats.gram of w is \[3\], which does not fit its weight \[2, 2\]"):
        pruning({"w": normal(2, 2)}, {"w": normal(2, 2)}, stats={"w": torch.ones(3)})
    assert (
        pruning({"w": normal(2), "s": torch.ones(())}, {"w": normal(2), "s": torch.ones(())}, pattern="*")["matrices"]
        == 1
    )
    with pytest.raises(Error, match="no matrix to look at"):
        pruning({"w": normal(2)}, {"w": normal(2)})


def test_zeros_before_and_matrices_of_nothing():
    found = pruning({"w": torch.zeros(2, 2), "e": torch.zeros(0, 3)}, {"w": torch.zeros(2, 2), "e": torch.zeros(0, 3)})
    assert found.table[0]["change"] == 0
    assert found.figures["zeros"] == 1
    assert "zeros" in str(found)


def test_it_can_be_drawn(tmp_path):
    model = network()
    found = pruning(model, ws.prune.magnitude(model, 0.5), stats=ws.stats.gram(model, [normal(9, 6)]))
    assert found.save(tmp_path / "report.html").stat().st_size > 1000
