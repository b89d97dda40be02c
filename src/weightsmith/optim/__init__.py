"""Optimizers: what moves weights along training, and what it has to remember for that.

The signature of the room: a ``torch.optim.Optimizer``, or a function from one to one. Here so far: states of 8 bits
around any optimizer.
"""

from weightsmith.card import table
from weightsmith.optim._eight_bit import EightBit, eight_bit, state_bytes, whole_states
from weightsmith.optim._stable_embedding import StableEmbedding, embeddings

METHODS = table(eight_bit)

__all__ = [
    "METHODS",
    "EightBit",
    "StableEmbedding",
    "eight_bit",
    "embeddings",
    "state_bytes",
    "whole_states",
]
