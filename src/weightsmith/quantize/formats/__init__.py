"""Quantized weights as other programs read them, and back.

The signature of the room: ``pack(coded, format=) -> Weights`` in which our codes have become the tensors, and the words
of config.json, of a format; ``unpack(folder) -> Weights`` of floats, whatever format the folder is in. Codes are kept
as they are: what a format cannot hold is an error that names the tensors, and never a folder that loads as another
model.
"""

from __future__ import annotations

from typing import Any

import torch

from weightsmith.errors import Error, FormatError, did_you_mean
from weightsmith.quantize._layout import METADATA, decoded
from weightsmith.quantize.formats import _bitsandbytes, _compressed_tensors, _gguf, _gptq
from weightsmith.quantize.formats._parts import words_of
from weightsmith.quantize.formats._torchao import torchao
from weightsmith.weights import Weights, open

FORMATS: tuple[str, ...] = (*_compressed_tensors.FORMATS, *_gptq.FORMATS, *_bitsandbytes.FORMATS, *_gguf.FORMATS)
"""What `pack` writes. ``"compressed-tensors"`` chooses for each tensor the one of its formats that holds its grid."""


def pack(weights: Any, format: str = "compressed-tensors", **options: Any) -> Weights:
    """Quantized weights in the format of another program; nothing is read yet.

    Args:
        weights: codes, as the methods of `weightsmith.quantize` make them, or a folder of them.
        format: one of `FORMATS`: ``"compressed-tensors"`` (vLLM, transformers; integers of 2 to 8 bits, e4m3, MXFP8,
            MXFP6 of e2m3, MXFP4, NVFP4; several grids in one model), or one of its own by name; ``"gptq"``,
            ``"gptq_v2"`` and ``"awq"`` (vLLM, SGLang, GPTQModel), with scales in float16; ``"bitsandbytes"``
            (transformers; nf4); ``"gguf"`` (llama.cpp), a whole model in one file, also of weights that are not coded.
        options: of GGUF: ``rest`` (``"F16"``), how matrices that are not coded are packed; ``requantize`` (None), how
            those are whose codes it cannot hold; ``ternary`` (``"TQ2_0"``, or ``"TQ1_0"``, which is smaller); ``keys``,
            which overrule its header's; ``tokenizer`` (True).

    Returns:
        Weights whose `save` writes the folder. ``int-quantized`` and ``float-quantized`` stand for activations that are
        quantized too, when the model runs; all other formats are of weights alone. GPTQ, AWQ and GGUF keep scales in
        float16: others are rounded, by up to 2^-11 of their size, with a warning where it is more than 1e-3. Quantize
        with ``scale_dtype="float16"`` for codes that fit the scales as they are written.

    Raises:
        Error: an unknown format, or tensors that it cannot hold, by name and with the reason. What only values show is
            found when they are written, and nothing is kept: scales too large for float16, and zero points of 0, which
            ``"gptq"`` cannot store and ``"gptq_v2"`` can.

    >>> coded = ws.quantize.rtn({"l.weight": torch.tensor([[7.5, -7.5, 1.0, 0.4]] * 8)}, bits=4)
    >>> list(pack(coded, "awq"))
    ['l.qweight', 'l.qzeros', 'l.scales']
    >>> unpack(pack(coded, "awq"))["l.weight"][0]
    tensor([ 7., -8.,  1.,  0.], dtype=torch.float16)
    """
    opened = open(weights)
    if format in _gguf.FORMATS:
        return _gguf.pack(opened, **options)
    if options:
        raise Error(f"the format {format} has no option {next(iter(options))}")
    if format in _compressed_tensors.FORMATS:
        return _compressed_tensors.pack(opened, format)
    if format in _gptq.FORMATS:
        return _gptq.pack(opened, format)
    if format in _bitsandbytes.FORMATS:
        return _bitsandbytes.pack(opened)
    raise Error(f"there is no format {format!r}{did_you_mean(str(format), FORMATS)}; known: {', '.join(FORMATS)}")


def unpack(weights: Any, dtype: torch.dtype | str | None = None) -> Weights:
    """Float weights from a quantized model in any of the formats, lazily and under the usual names.

    Args:
        weights: a folder or file, or what `pack` or a method of `weightsmith.quantize` made.
        dtype: of the tensors that were quantized; that of their scales by default.

    Raises:
        Error: nothing in it is quantized, or in a way that is not understood.
        FormatError: what it says of itself and its tensors contradict each other.
    """
    opened = open(weights)
    if METADATA in opened.metadata:
        return decoded(opened, dtype)
    method = words_of(opened).get("quant_method")
    if method == "compressed-tensors" or (method is None and "config_groups" in words_of(opened)):
        return _compressed_tensors.unpack(opened, dtype)
    if method in ("gptq", "awq"):
        return _gptq.unpack(opened, dtype)
    if method == "bitsandbytes":
        return _bitsandbytes.unpack(opened, dtype)
    if method is not None:
        raise Error(
            f"config.json says that these weights are quantized by {str(method)[:40]!r}, which is not understood"
        )
    if any(name.endswith((".qweight", "_packed")) for name in opened):
        raise FormatError(
            "these weights do not say how they are coded: no word in a header, no quantization_config in config.json"
        )
    if (
        "weightsmith.gguf" in opened.metadata
    ):  # decoded when it was opened; what was made of such a file says so as well
        return opened if dtype is None else opened.cast(dtype)
    raise Error("nothing here is quantized: no tensor ends in _packed or .qweight")


__all__ = ["FORMATS", "pack", "torchao", "unpack"]
