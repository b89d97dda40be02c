"""Sharded training in which codes travel: of weights before every layer's turn, of gradients after it.

Each process holds its shard of the weights in full precision; what the others compute with is what its codes stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as processes

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize.codecs._wire import Wire, gathered, scattered_sum


@card(
    paper="Markov, Vladu, Guo, Alistarh 2023, 'Quantized Distributed Training of Large Models with Convergence "
    "Guarantees' (quantized sharded data parallelism)",
    covers=("quantized-distributed-training-large",),
    unit="model",
    claim="training that is sharded over processes learns as well where weights and gradients travel as 8 bits",
    departs="one buffer holds all parameters of a sharded module, so norms and biases are coded too, in blocks that "
    "they share; the learned levels of the paper's experiments are not here",
)
def send_codes(model: nn.Module, *, weights: Wire | None = None, gradients: Wire | None = None) -> int:
    """Let the modules of a model that ``fully_shard`` changed send codes.

    The weights that a module computes with are then the decoded ones, in every process the same bits, its own among
    them; the optimizer goes on with the shards as they are. Gradients are coded part by part, decoded and added.

    Args:
        model: holds modules that ``torch.distributed.fsdp.fully_shard`` has been called on, itself perhaps.
        weights: for all-gathers; None: as they are. ``Wire(BlockCodec("uniform", block=1024))`` is near the paper's.
        gradients: for reduce-scatters; None: as they are. One that rounds at random, ``rounding="stochastic"``, is
            right in the mean.

    Returns:
        The modules that send codes now.

    Raises:
        Error: none is sharded; this PyTorch cannot be told how to send. While training: parameters of several dtypes
            in one module; gradients that are to be scaled while they are summed.
    """
    found: list[Any] = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
    if not found:
        raise Error("send_codes needs modules that fully_shard has been called on, found none")
    if not all(hasattr(module, "set_custom_all_gather") for module in found):
        raise Error("send_codes needs a newer PyTorch: fully_shard of this one has no set_custom_all_gather")
    for module in found:
        if weights is not None:
            module.set_custom_all_gather(_Gather(weights))
        if gradients is not None:
            module.set_custom_reduce_scatter(_Scatter(gradients))
    return len(found)


class _Buffers:
    """Room for what is sent and received, as PyTorch asks for it."""

    def __init__(self, wire: Wire):
        self.wire = wire

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def among(self, group: Any) -> Wire:
        """The wire, if its processes are those of the call."""
        if processes.get_process_group_ranks(group) != processes.get_process_group_ranks(self.wire.group):
            raise Error(
                "send_codes: a module is sharded over other processes than the wire's group; give Wire that of its "
                "mesh: group=mesh.get_group()"
            )
        return self.wire


class _Gather(_Buffers):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        if not input_tensor.is_floating_point():
            raise Error("send_codes: the parameters of one sharded module need one floating dtype")
        output_tensor.view(-1).copy_(gathered(input_tensor, self.among(group)).view(-1))


class _Scatter(_Buffers):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        total = scattered_sum(input_tensor.view(-1), self.among(group))
        if op == processes.ReduceOp.AVG:
            total /= processes.get_world_size(group)
        elif op != processes.ReduceOp.SUM:
            raise Error("send_codes knows sums and means of gradients; set_gradient_divide_factor asks for another")
        output_tensor.view(-1).copy_(total)
