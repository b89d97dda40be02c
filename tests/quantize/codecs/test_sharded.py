"""Two real processes that share a model out and send codes of it, against plain sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests._processes import together
from torch import nn

from weightsmith.errors import Error
from weightsmith.quantize.codecs import BlockCodec, Wire, gathered, send_codes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no processes")
CODEC = BlockCodec("uniform", block=64)


def net(rank_seed: int = 0) -> nn.Sequential:
    torch.manual_seed(rank_seed)
    return nn.Sequential(nn.Linear(12, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 3))


def trained(case: str, rank: int, seen: dict[str, Any]) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    sending = Wire(CODEC), Wire(BlockCodec("uniform", block=64, rounding="stochastic"), generator=torch.Generator())
    if case != "plain":
        sides = {"weights": (sending[0], None), "gradients": (None, sending[1]), "both": sending}[case]
        assert send_codes(model, weights=sides[0], gradients=sides[1]) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 12, generator=generator)[rank::2]
        if step == 0:  # what the first module computes with
            keep = model[0].register_forward_pre_hook(
                lambda module, _: seen.update(weight=module.weight.detach().clone())
            )
        loss = (model(inputs) - inputs[:, :3].sin()).square().mean()
        keep.remove()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            seen["gradient"] = model[0].weight.grad.full_tensor().clone()
        optimizer.step()
    seen["bytes"] = [(wire.sent, wire.plain) for wire in sending]
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for case in ("plain", "weights", "gradients", "both"):
        seen: dict[str, Any] = {}
        found[case] = (trained(case, rank, seen), seen)
    # The first module's shards as one process codes them: rows 0 to 16 of 17 each, weights and then the bias.
    whole = net()[0]
    padded = [nn.functional.pad(value.detach(), (0, 0) * (value.dim() - 1) + (0, 1)) for value in whole.parameters()]
    own = torch.cat([value.chunk(2)[rank].reshape(-1) for value in padded])
    found["expected"] = gathered(own, Wire(CODEC))[:, : 17 * 12].reshape(34, 12)[:33]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    together(__file__, folder, imports=["torch.distributed.fsdp"])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_modules_compute_with_what_codes_stand_for(found):
    for rank in range(2):
        assert torch.equal(found[rank]["weights"][1]["weight"], found[rank]["expected"])
        plain = found[rank]["plain"][1]["weight"]
        assert torch.equal(found[rank]["gradients"][1]["weight"], plain)
        assert 0 < float((found[rank]["expected"] - plain).abs().max()) < 0.005
    assert torch.equal(found[0]["both"][1]["weight"], found[1]["both"][1]["weight"])


def test_gradients_are_means_of_what_codes_stand_for(found):
    plain, coded = (found[0][case][1]["gradient"] for case in ("plain", "gradients"))
    assert 0 < float((plain - coded).norm()) < 0.02 * float(plain.norm())


@pytest.mark.parametrize("case", ["weights", "gradients", "both"])
def test_what_is_learned_is_nearly_the_same(found, case: str):
    for name, value in found[0][case][0].items():
        assert torch.equal(value, found[1][case][0][name])
        change = (found[0]["plain"][0][name] - dict(net().state_dict())[name]).norm()
        assert 0 < float((value - found[0]["plain"][0][name]).norm()) < 0.1 * float(change)


def test_bytes_are_fewer(found):
    for rank in range(2):
        for sent, plain in found[rank]["both"][1]["bytes"]:
            assert 0.25 * plain < sent < 0.42 * plain  # blocks of 64 with two numbers each
        assert found[rank]["weights"][1]["bytes"][1] == (0, 0)
        assert found[rank]["gradients"][1]["bytes"][0] == (0, 0)


def test_a_model_that_is_not_sharded():
    with pytest.raises(Error, match="fully_shard has been called on, found none"):
        send_codes(net())
