"""What quantizing has done to a checkpoint: bytes by layer, and how far its outputs move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.inspect._parts import Source, grid, named
from weightsmith.inspect._pruning import known_of, relative, sums_of
from weightsmith.inspect._report import Report
from weightsmith.prune import prunable
from weightsmith.quantize import Code, codes, dequantize
from weightsmith.quantize.grids import described
from weightsmith.weights import Weights, open


@card(
    paper="Frantar, Ashkboos, Hoefler, Alistarh 2022, 'GPTQ: Accurate Post-Training Quantization for Generative "
    "Pre-trained Transformers' (the change of a layer's outputs on calibration data as what counts)",
    unit="row",
    claim="the change of outputs is what running the layer on the data gives",
)
def quantized(before: Source, after: Source, *, stats: Source | None = None, threads: int | None = None) -> Report:
    r"""Bits, bytes, and the relative change of weights and of outputs, matrix by matrix.

    .. math:: e_W = \frac{\lVert Q - W \rVert_F}{\lVert W \rVert_F}, \qquad
        e_Y = \sqrt{\frac{\operatorname{tr}\, (Q - W)\, G\, (Q - W)^\top}{\operatorname{tr}\, W G W^\top}}

    Args:
        before: the checkpoint as it was.
        after: with codes, as a method of `weightsmith.quantize` made it.
        stats: of the inputs on data (`weightsmith.stats.gram`), of some of the matrices or of all.
        threads: workers; default one a core. Read by runs of rows.

    Returns:
        Report: a row a coded matrix: its ``grid``, ``bits``, ``group`` and ``padding``, ``bits a weight`` with all
        that decodes them, ``bytes``, ``bytes before``, the relative ``change`` and, where data tell, ``output
        change``. The figures are of all together, and ``bytes in all`` of the whole checkpoint; matrices that were
        left in full precision are named in a note.

    Raises:
        Error: nothing is coded, or what is coded has other names or shapes before.

    >>> whole = {"l.weight": torch.tensor([[7.5, -7.5, 1.0, 0.0]])}
    >>> round(quantized(whole, ws.quantize.rtn(whole))["change"], 4)
    0.0664
    """
    old, new = open(before), open(after)
    coded = codes(new)
    if not coded:
        raise Error(f"nothing is quantized among {listed(new)}: no tensor ends in _packed")
    values = dequantize(new, torch.float32)
    for name, code in coded.items():
        if name not in old or old.spec(name).shape != code.shape:
            said = str(old.spec(name)) if name in old else "not there"
            raise Error(f"{name}: is coded as {list(code.shape)}, and before it is {said}")
    names = list(coded)
    known = {} if stats is None else known_of(open(stats), old, names, "quantized")
    sums = sums_of(old, values, names, known, threads)
    rows = [_row(old, name, coded[name], sums[name]) for name in names]
    total: dict[str, Any] = {
        word: torch.stack(
            [sums[name][word] for name in (known if word.startswith("output") else names)] or [torch.zeros(())]
        ).sum()
        for word in ("change", "energy", "outputs", "output energy")
    }
    weights = sum(old.spec(name).numel for name in names)
    left = [name for name in prunable(old) if name not in coded and name in new]
    figures = {
        "matrices": len(rows),
        "bits a weight": 8 * sum(code.nbytes for code in coded.values()) / max(weights, 1),
        "bytes": sum(code.nbytes for code in coded.values()),
        "bytes before": sum(old.spec(name).nbytes for name in names),
        "bytes in all": new.nbytes,
        "bytes in all before": old.nbytes,
        "change": relative(total["change"], total["energy"]),
        "output change": relative(total["outputs"], total["output energy"]) if known else None,
        "left in full precision": len(left),
    }
    what = "output change" if known else "change"
    plots = [grid(what, rows, lambda row: row[what]), grid("bits a weight", rows, lambda row: row["bits a weight"])]
    return Report("What quantizing has changed", figures, rows, plots, _notes(coded, left))


def _row(weights: Weights, name: str, code: Code, sums: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    spec = weights.spec(name)
    return {
        **named(name),
        "values": spec.numel,
        "grid": described(code.grid)["grid"],
        "bits": code.grid.bits,
        "group": code.grid.group,
        "padding": code.padding,
        "bits a weight": code.bits,
        "bytes": code.nbytes,
        "bytes before": spec.nbytes,
        "change": relative(sums["change"], sums["energy"]),
        "output change": relative(sums["outputs"], sums["output energy"]),
    }


def _notes(coded: Mapping[str, Code], left: list[str]) -> list[str]:
    notes = ["A small change of weights is no promise: what counts is how far the outputs move."]
    if left:
        notes.append(f"Left in full precision: {', '.join(left)}.")
    padded = [name for name, code in coded.items() if code.padding]
    if padded:
        notes.append(f"Rows that groups do not fill are padded with zeros: {', '.join(padded)}.")
    ragged = [name for name, code in coded.items() if _ragged(code)]
    if ragged:
        notes.append(f"The last group of a row is shorter: {', '.join(ragged)}.")
    return notes


def _ragged(code: Code) -> bool:
    return bool(code.grid.group) and (code.inputs + code.padding) % (code.grid.group or 1) != 0
