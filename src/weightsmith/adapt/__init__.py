"""Adapters: small changes of a model that are kept apart from it.

The signature of the room: ``(model, adapter, ...) -> Weights``. An adapter is a `Weights` with an
``adapter_config.json`` in its ``files``, and saved to a folder it is one that PEFT loads. No model is
built for any of it: adapters are merged into checkpoints, combined and taken out of them as tensors.
A module in memory learns one through `lora`, and ``fold`` makes it plain again.
"""

from weightsmith.adapt._apply import apply
from weightsmith.adapt._combine import combine
from weightsmith.adapt._extract import extract
from weightsmith.adapt._lora import LowRank, fold, lora
from weightsmith.adapt._parametrized import parametrized, unparametrized
from weightsmith.adapt._qa_lora import GroupedLowRank, qa_lora
from weightsmith.card import table

METHODS = table(apply, combine, extract, lora, qa_lora)

__all__ = [
    "METHODS",
    "GroupedLowRank",
    "LowRank",
    "apply",
    "combine",
    "extract",
    "fold",
    "lora",
    "parametrized",
    "qa_lora",
    "unparametrized",
]
