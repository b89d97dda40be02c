"""Sums and gathers over processes in which codes travel instead of numbers.

Every message is one flat run of bytes: the numbers of blocks, then codes. What is summed is decoded first, so errors
do not grow with the number of processes; and what all get back is decoded of the same bytes, so all end with the same
bits. A block that holds a NaN or an infinity arrives as NaN, everywhere: an error in one process would leave the others
waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as processes

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.quantize.codecs._blocks import BlockCodec, Blocks


@dataclass
class Wire:
    """How processes talk, and how much was said.

    Attributes:
        codec: of every message.
        group: of the processes; None: all.
        generator: for codecs that round at random. Each process may have its own.
        sent: bytes that this process has sent, to every other process what that one gets.
        plain: bytes that it would have sent of the same calls in the tensors' own dtype.
    """

    codec: BlockCodec
    group: Any = None
    generator: torch.Generator | None = None
    sent: int = 0
    plain: int = 0

    def __post_init__(self) -> None:
        if not processes.is_available() or not processes.is_initialized():
            raise Error("sending codes needs torch.distributed.init_process_group first")


@card(
    paper="Markov, Vladu, Guo, Alistarh 2023, 'Quantized Distributed Training of Large Models with Convergence "
    "Guarantees' (weights before the all-gather of sharded training)",
    unit="model",
    claim="every process gets the same bits, in a quarter of the bytes",
)
@torch.no_grad()
def gathered(value: Tensor, wire: Wire) -> Tensor:
    """The tensors of all processes, their own as well as the others see it.

    Args:
        value: floating, of one shape in all processes of the wire's group.
        wire: the codec, the group and the count of bytes.

    Returns:
        ``[processes, *shape]`` in the dtype and on the device of ``value``; the same bits in every process.
    """
    message = _packed(wire.codec.encode(value, generator=wire.generator, check=False))
    others = processes.get_world_size(wire.group) - 1
    told = torch.empty((others + 1) * len(message), dtype=torch.uint8, device=message.device)
    gather = getattr(processes, "all_gather_single", None) or processes.all_gather_into_tensor  # its name before
    gather(told, message, group=wire.group)
    wire.sent += others * len(message)
    wire.plain += others * value.nbytes
    made = torch.empty((others + 1, *value.shape), dtype=value.dtype, device=value.device)
    for part, one in zip(told.chunk(others + 1), made, strict=True):
        wire.codec.decode(_unpacked(part, one, wire.codec), out=one.view(-1))
    return made


@card(
    paper="Markov, Vladu, Guo, Alistarh 2023, 'Quantized Distributed Training of Large Models with Convergence "
    "Guarantees' (gradients before the reduce-scatter of sharded training)",
    unit="model",
    claim="every process gets the part of the sum that is its own, in a quarter of the bytes",
)
@torch.no_grad()
def scattered_sum(value: Tensor, wire: Wire) -> Tensor:
    """A process's part of the sum over processes of a flat tensor; each sends every other its part as codes.

    Args:
        value: ``[n]`` floating, n a multiple of the number of processes.
        wire: the codec, the group and the count of bytes.

    Returns:
        ``[n / processes]`` float32: the sum of what the processes' codes stand for; a process's own share is coded too,
        so that all are treated alike.

    Raises:
        Error: not flat, or a length that cannot be shared out evenly.
    """
    world = processes.get_world_size(wire.group)
    if value.dim() != 1 or len(value) % world:
        raise Error(f"scattered_sum needs [n] with n a multiple of {world} processes, got {list(value.shape)}")
    messages = torch.cat(
        [_packed(wire.codec.encode(part, generator=wire.generator, check=False)) for part in value.view(world, -1)]
    )
    told = torch.empty_like(messages)
    processes.all_to_all_single(told, messages, group=wire.group)
    wire.sent += len(messages) // world * (world - 1)
    wire.plain += value.nbytes // world * (world - 1)
    total = torch.zeros(len(value) // world, dtype=torch.float32, device=value.device)
    for part in told.chunk(world) if len(told) else ():
        total += wire.codec.decode(_unpacked(part, total, wire.codec))
    return total


def mean_gradients(wire: Wire, bucket):  # PyTorch refuses annotations that are text
    """The communication hook of ``DistributedDataParallel``: ``model.register_comm_hook(wire, mean_gradients)``.

    The mean over processes of a bucket of gradients, as `scattered_sum` and then `gathered`. With a codec that rounds
    at random the mean is right on average. A gradient that is not finite makes the mean not finite, in all processes.

    Args:
        wire: the codec, the group and the count of bytes.
        bucket: ``torch.distributed.GradBucket``, as ``DistributedDataParallel`` gives it.

    Returns:
        A future that is done: the mean, of the bucket's dtype, with the same bits in every process.
    """
    flat: Tensor = bucket.buffer()
    world = processes.get_world_size(wire.group)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % world))
    mean = (scattered_sum(padded, wire) / world).to(flat.dtype)
    whole = gathered(mean, wire).view(-1)[: len(flat)]
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(whole)
    return future


def _packed(blocks: Blocks) -> Tensor:
    """All bytes of some codes in a row; those of numbers first, where they are aligned."""
    numbers, codes = blocks.tensors[1:], blocks.codes
    return torch.cat([*(tensor.view(torch.uint8) for tensor in numbers), codes])


def _unpacked(message: Tensor, like: Tensor, codec: BlockCodec) -> Blocks:
    """The codes in a message, of as many values as ``like`` has."""
    numel = like.numel()
    length = codec.block or max(numel, 1)
    size = 4 * -(-numel // length)
    sizes = [size, size] if codec.codebook == "uniform" else [size]
    *numbers, codes = message.split([*sizes, len(message) - sum(sizes)])
    scale, *offset = (part.clone().view(torch.float32) for part in numbers)
    return Blocks(codes, scale, offset[0] if offset else None, tuple(like.shape), like.dtype)
