"""torchao: the tensors compute what the codes say; what does not fit changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.quantize.formats import torchao
from weightsmith.quantize.grids import Float, Integer

pytest.importorskip("torchao", reason='needs torchao: pip install "weightsmith[peers]"', exc_type=ImportError)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.LayerNorm(24), nn.Linear(24, 8, bias=False)).to(dtype)


GRIDS = {
    "4 bits": Integer(4, group=8), "3 bits, affine": Integer(3, group=12, symmetric=False), "8 bits": Integer(8),
    "1 bit": Integer(1), "one step": Integer(8, per_tensor=True), "narrow": Integer(4, span="narrow"),
    "one step, affine": Integer(5, per_tensor=True, symmetric=False), "a negative step": Integer(4, span="signed"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", GRIDS)
def test_it_computes_what_the_codes_say(case: str, dtype: torch.dtype):
    grid = GRIDS[case]
    coded = ws.quantize.rtn(net(dtype), grid=grid, pattern="2.weight" if grid.group == 12 else ["0.weight", "2.weight"])
    expected = net(dtype)
    ws.quantize.dequantize(coded, dtype).load_into(expected)
    found = net(dtype)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert torchao(coded, found) is found
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(found(inputs), expected(inputs))
    weight: Any = found[2].weight
    assert type(weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.dequantize(), expected[2].weight)


def test_a_module_without_memory():
    coded = ws.quantize.rtn(net(), grid=Integer(4, group=8))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 24), nn.LayerNorm(24), nn.Linear(24, 8, bias=False))
    inputs = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(torchao(coded, empty)(inputs), torchao(coded, net())(inputs))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("grid", "module", "message"),
    [
        (Float("e4m3"), net(), "Float is none of its own"),
        (Integer(4, symmetric=False, zero="float"), net(), "smallest value is kept as a float"),
        (Integer(4), net().double(), "is float64 in the module"),
        (Integer(4), net()[:2], r"it has no 2\.weight"),
        (Integer(4), nn.Sequential(*net(), nn.Linear(8, 2)), r"it needs 3\.weight, 3\.bias"),
        (Integer(4), nn.Sequential(nn.Linear(32, 24), *list(net())[1:]), r"0\.weight \[24, 64\] into \[24, 32\]"),
    ],
)
def test_what_does_not_fit_changes_nothing(grid: Any, module: nn.Module, message: str):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(Error, match=message):
        torchao(ws.quantize.rtn(net(), grid=grid), module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_tensor_that_the_module_shares():
    coded = ws.quantize.rtn({"a.weight": torch.randn(16, 16)}, grid=Integer(4))
    with pytest.raises(Error, match=r"b\.weight shares the tensor of a\.weight"):
        torchao(coded, Shared())
