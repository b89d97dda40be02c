"""Sparse training in several processes: masks that are alike without being sent, and masks of shards."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import weightsmith as ws
from weightsmith.prune.sparse import control

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no processes")
WORLD = 2
RULES = ("rigl", "sparse_evolutionary", "sparse_momentum", "gmp", "soft_shrinkage")


def rule_of(name: str) -> ws.prune.sparse.Rule:
    more = {} if name == "soft_shrinkage" else {"every": 2}
    return getattr(ws.prune.sparse, name)(0.75, stop=6, **more)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))  # 7 rows are not even over 2 processes


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)


def trained(model: nn.Module, name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = control(model, optimizer, rule_of(name))
    for step in range(7):
        inputs, labels = data(step)
        optimizer.zero_grad()
        (model(inputs[rank::world]) - labels[rank::world]).square().mean().backward()
        optimizer.step()
        if step == 3:  # goes on from what it says of itself
            saved = masks.state_dict()
            masks.close()
            masks = control(model, optimizer, rule_of(name), state=saved)
    assert abs(masks.sparsity - 0.75) < 0.01
    return masks.masks.to_dict()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        found = {}
        for name, sharded in itertools.product(RULES, (False, True)):
            model: nn.Module = net()
            if sharded:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
            else:
                model = nn.parallel.DistributedDataParallel(model)
            masks = trained(model, name, rank, WORLD)
            state = {key.removeprefix("module."): value for key, value in model.state_dict().items()}
            state = {key: value.full_tensor() if sharded else value for key, value in state.items()}
            found[name, sharded] = (masks, state)
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path):
    """Of ``DistributedDataParallel`` each has the whole model, of ``fully_shard`` a part of it."""
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(WORLD)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in running:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in running:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    with torch.random.fork_rng():
        for name in RULES:
            model = net()
            alone = trained(model, name, 0, 1)
            for sharded in (False, True):
                (masks, state), (others, _) = first[name, sharded], second[name, sharded]
                for key, mask in alone.items():
                    assert torch.equal(masks[key], others[key]), (name, sharded, key)
                    assert torch.equal(masks[key], mask), (name, sharded, key)
                for key, value in model.state_dict().items():
                    torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)
                    if key in alone:
                        assert not state[key][~alone[key]].any()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
