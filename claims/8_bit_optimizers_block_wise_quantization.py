"""Does a language model learn as well when its optimizer remembers a byte a value instead of four?

A small language model of words of Python's library (4 blocks of width 64, 243 k parameters) learns for 100 steps with
AdamW: with states of 32 bits; with 8 bits as in the paper (dynamic table, blocks of 2048, embeddings whole); and with 8
bits on evenly spaced values and one scale a tensor. Same start, same batches. Held-out nats a word; the claim is that
the second is at most 1 % above the first, as a share of it. The even codes are reported beside, and how far the codes
of the 32-bit run's own states would be from them. (200 steps were tried first, on seed 0, and took too long.
A run that diverges counts as 1000 times the loss.)
"""

import copy
import math

import torch
from _digits import one_thread
from _small_language import batches, data, language, loss_of, next_word

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize.codecs import BlockCodec

CLAIM = Claim(
    key="8-bit-optimizers-block-wise-quantization",
    statement="AdamW with states of 8 bits in blocks ends within 1 % of the held-out loss of AdamW with 32-bit states",
    method="loss over that of 32 bits, 8 bits in blocks",
    baseline="loss over that of 32 bits, 32 bits",
    higher_is_better=False,
    margin=-0.01,
    seeds=(0, 1, 2, 3),
)
STEPS, RATE, MOST = 100, 3e-3, 1000.0
EVEN = BlockCodec("linear", block=None)


def measure(seed: int) -> dict[str, float]:
    """Shares of the 32-bit loss; bytes of states as a share of theirs; mean errors of codes of the last states."""
    training, held_out = data(seed)
    steps = batches(training, STEPS, seed)
    whole, first = _trained(seed, steps, lambda optimizer, model: optimizer)
    blocks, second = _trained(
        seed, steps, lambda optimizer, model: ws.optim.eight_bit(optimizer, keep=ws.optim.embeddings(model))
    )
    even, _ = _trained(
        seed, steps, lambda optimizer, model: ws.optim.eight_bit(optimizer, codec=EVEN, keep=ws.optim.embeddings(model))
    )
    third = ws.optim.eight_bit(copy.deepcopy(first))
    loss = loss_of(whole, held_out)
    return {
        "loss over that of 32 bits, 32 bits": 1.0,
        "loss over that of 32 bits, 8 bits in blocks": loss_of(blocks, held_out) / loss,
        "loss over that of 32 bits, 8 bits, even, a tensor": min(loss_of(even, held_out) / loss, MOST, key=_number),
        "nats a word, 32 bits": loss,
        "bytes over those of 32 bits": ws.optim.state_bytes(second) / ws.optim.state_bytes(first),
        "bytes over those of 32 bits, embeddings too": ws.optim.state_bytes(third) / ws.optim.state_bytes(first),
        "relative error, dynamic, blocks": _error(first, BlockCodec()),
        "relative error, dynamic, a tensor": _error(first, BlockCodec(block=None)),
        "relative error, even, blocks": _error(first, BlockCodec("linear")),
        "relative error, even, a tensor": _error(first, EVEN),
    }


def _number(value: float) -> float:
    """Whatever is not a number comes last."""
    return math.inf if math.isnan(value) else value


@one_thread()
def _trained(seed, steps, changed):
    """A model, and its optimizer after the last step; warm-up, then a rate that falls along a line."""
    model = language(seed)
    optimizer = changed(torch.optim.AdamW(model.parameters(), lr=RATE), model)
    for step, batch in enumerate(steps):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 20, 1 - step / len(steps))
        optimizer.zero_grad()
        (next_word(model, batch) / len(batch[0])).backward()
        optimizer.step()
    return model.eval(), optimizer


@torch.no_grad()
def _error(optimizer, codec) -> float:
    """The mean over values of what coding changes, as a share of the value, of second moments of matrices."""
    codec = BlockCodec(codec.codebook, block=codec.block, signed=False)
    total = count = 0.0
    for state in optimizer.state.values():
        value = state["exp_avg_sq"]
        if value.numel() >= 4096:
            there = value > 0
            total += float(((codec.decode(codec.encode(value)) - value).abs() / value)[there].sum())
            count += float(there.sum())
    return total / count
