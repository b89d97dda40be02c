"""Two real processes that talk in codes: the numbers, the same bits in both, and the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests._processes import together
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.quantize.codecs import BlockCodec, Wire, gathered, mean_gradients, scattered_sum

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no processes")
WORLD = 2
CODECS = {
    "dynamic": BlockCodec(block=64),
    "uniform": BlockCodec("uniform", block=64),
    "four": BlockCodec("uniform", bits=4, block=32, rounding="stochastic"),
    "shifted": BlockCodec("uniform", block=None, rounding="shifted"),
}


def own(rank: int, numel: int = 300) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank + 10))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 41), nn.ReLU(), nn.Linear(41, 3))


def data(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(8, 30, generator=generator), torch.randn(8, 3, generator=generator)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    for name, codec in CODECS.items():
        wire = Wire(codec, generator=torch.Generator().manual_seed(rank))
        all_of_them = gathered(own(rank).view(3, 100), wire)
        between = (wire.sent, wire.plain)
        part = scattered_sum(own(rank), wire)
        found[name] = (all_of_them, part, between, (wire.sent, wire.plain))
    wire = Wire(CODECS["dynamic"])
    found["bfloat16"] = gathered(own(rank).bfloat16(), wire)
    found["nothing"] = (gathered(torch.empty(0), wire), scattered_sum(torch.empty(0), wire))
    bad = own(rank)
    bad[70 + rank] = torch.nan
    found["nan"] = (gathered(bad, wire), scattered_sum(bad, wire))
    try:
        scattered_sum(torch.zeros(3), wire)
    except Error as error:
        found["odd"] = str(error)
    for name in ("dynamic", "four"):
        model = nn.parallel.DistributedDataParallel(net())
        wire = Wire(CODECS[name], generator=torch.Generator().manual_seed(rank))
        model.register_comm_hook(wire, mean_gradients)
        inputs, labels = data(rank)
        (model(inputs) - labels).square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found["hook", name] = (gradients, wire.sent, wire.plain)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("wire")
    together(__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CODECS)
def test_all_see_the_same_and_it_is_what_codes_stand_for(found, name: str):
    codec = CODECS[name]
    assert torch.equal(found[0][name][0], found[1][name][0])
    for rank in range(WORLD):
        expected = codec.decode(codec.encode(own(rank), generator=torch.Generator().manual_seed(rank)))
        assert torch.equal(found[0][name][0][rank], expected.view(3, 100))


@pytest.mark.parametrize("name", ["dynamic", "uniform"])
def test_each_has_its_part_of_the_sum(found, name: str):
    codec = CODECS[name]
    for rank in range(WORLD):
        parts = [codec.decode(codec.encode(own(other).view(2, 150)[rank])) for other in range(WORLD)]
        torch.testing.assert_close(found[rank][name][1], sum(parts))
        error = (found[rank][name][1] - (own(0) + own(1)).view(2, 150)[rank]).abs()
        assert float(error.max()) < 0.1


@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_counted(found, name: str):
    codec = CODECS[name]
    for rank in range(WORLD):
        _, _, between, after = found[rank][name]
        assert between == (codec.nbytes(300), 1200)
        assert after == (codec.nbytes(300) + codec.nbytes(150), 1200 + 600)


def test_other_dtypes_nothing_and_what_is_not_finite(found):
    assert found[0]["bfloat16"].dtype == torch.bfloat16
    assert found[0]["nothing"][0].shape == (2, 0)
    assert found[1]["nothing"][1].shape == (0,)
    for rank in range(WORLD):
        everything, part = found[rank]["nan"]
        assert everything.isnan().any(dim=1).tolist() == [True, True]
        assert int(everything[0].isnan().sum()) == 64
        assert bool(part.isnan().any()) == (rank == 0)
        assert "[n] with n a multiple of 2 processes, got [3]" in found[rank]["odd"]


@pytest.mark.parametrize(("name", "share"), [("dynamic", 0.3), ("four", 0.22)])
def test_gradients_of_two_processes(found, name: str, share: float):
    """The same in both, near the mean of plain ones, in fewer bytes."""
    plain = []
    for rank in range(WORLD):
        model = net()
        inputs, labels = data(rank)
        (model(inputs) - labels).square().mean().backward()
        plain.append([parameter.grad for parameter in model.parameters()])
    for place, (one, other) in enumerate(zip(found[0]["hook", name][0], found[1]["hook", name][0], strict=True)):
        assert torch.equal(one, other)
        mean = (plain[0][place] + plain[1][place]) / 2
        assert float((one - mean).norm()) < (0.03 if name == "dynamic" else 0.25) * float(mean.norm())
    assert 0 < found[0]["hook", name][1] < share * found[0]["hook", name][2]


def test_one_process_alone_is_told():
    with pytest.raises(Error, match="init_process_group first"):
        Wire(BlockCodec())
