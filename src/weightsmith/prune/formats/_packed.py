"""Pruned weights as fewer bytes on disk: what is not zero, and a bit for every entry.

At a share s of zeros a tensor of b bits an entry takes ``(1 - s) b + 1`` bits an entry: half of it from 56 % zeros
on in bf16, from 53 % in float32. It is a way to keep and to send weights; they are unpacked before they are used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, FormatError, did_you_mean, listed
from weightsmith.prune.formats._bits import (
    Bits,
    Dense,
    Kept,
    KeptOfFour,
    Rows,
    RowStarts,
    Rule,
    Sizes,
    counts_of,
    counts_of_bits,
    kept,
    places,
)
from weightsmith.prune.room import prunable
from weightsmith.weights import Lazy, Pattern, Spec, Step, Weights, apply, as_dtype, dtype_name, open, solve_all
from weightsmith.weights._files import Bytes, content_of

if TYPE_CHECKING:
    from weightsmith.inspect import Report

Source = str | os.PathLike[str] | Mapping[str, Any] | nn.Module

Format = Literal["bitmask", "sparse-bitmask", "sparse-24-bitmask"]

CONFIG, ASIDE, THEIRS = "config.json", "config.unpacked.json", "config.compressed-tensors.json"
"""What a model's config is called, where it is put so that nobody loads packed weights for plain ones, and what
compressed-tensors is told."""

PARTS = ("compressed", "bitmask", "shape")
"""What every packed tensor has; ``row_offsets`` may come on top."""

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # their zero is all bits zero but for the sign

_MOST_AXES = 8  # of a weight; more is a damaged file


def pack(
    weights: Source,
    format: Format = "bitmask",
    *,
    pattern: Pattern | None = None,
    exact: bool = False,
    threads: int | None = None,
) -> Weights:
    """Pruned weights without their zeros; `unpack` leads back, to the bit but for the sign of zero.

    ``"bitmask"`` makes of ``name`` the tensors ``name_compressed`` ``[kept]`` (what is not zero, in order),
    ``name_bitmask`` ``[ceil(n / 8)]`` uint8 (a bit an entry, the first one lowest) and ``name_shape``. `unpack` reads
    it, and no other program.

    ``"sparse-bitmask"`` and ``"sparse-24-bitmask"`` are layouts of compressed-tensors 0.13, gone from later ones: of
    ``X.weight`` they make ``X.compressed``, ``X.bitmask`` (rows of the last axis, each filled up to bytes), ``X.shape``
    and, in the first, ``X.row_offsets`` int64. For kernels of convolutions the first is larger than the tensor itself.
    In the second, every group of four along a row keeps exactly two values.

    In each of them ``config.json`` is put aside as ``config.unpacked.json``, so that other programs refuse the folder
    rather than load it without these tensors; `unpack` puts it back. For programs that still know the layouts of
    compressed-tensors 0.13 there is ``config.compressed-tensors.json``: rename it to ``config.json``. For later ones do
    not: transformers 5.23 with compressed-tensors 0.20 then fills these weights with *random* numbers, and says so in
    its load report alone (with 0.13 it refuses).

    Args:
        weights: pruned weights; anything that `weightsmith.open` opens.
        format: which layout.
        pattern: which tensors. By default the prunable ones that get smaller (and, for ``"sparse-24-bitmask"``, have no
            more than two values in any four).
        exact: a negative zero counts as a value (though it may be left out of ``"sparse-24-bitmask"``). By default
            both zeros are left out and come back as zero: pruning by a product with a mask leaves half of the zeros
            negative. NaN and infinities are always kept.
        threads: workers of the counting; default one a core.

    Returns:
        Weights: lazy. The sizes of ``compressed`` must be known, so the tensors are read (computed) once here, and
        again for each part when it is written: save what takes long to compute before you pack it. A few blocks of
        65,536 entries are held a thread; a whole tensor for a method that cannot be cut, and for the ``row_offsets`` of
        convolutions.

    Raises:
        ValueError: another format, nothing that fits or gets smaller, a tensor that the layout cannot hold.

    >>> packed = pack({"w": torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0]])}, pattern="w")
    >>> packed["w_compressed"], packed["w_bitmask"]
    (tensor([5., 7.]), tensor([66], dtype=torch.uint8))
    >>> unpack(packed)["w"]
    tensor([[0., 5., 0., 0.],
            [0., 0., 7., 0.]])
    """
    if format not in get_args(Format):
        raise Error(
            f"no format {format!r}{did_you_mean(str(format), get_args(Format))}; known: {', '.join(get_args(Format))}"
        )
    opened = open(weights)
    ties = opened.ties
    fitting = prunable(opened) if pattern is None else opened.names(pattern, floating=True)
    names = list(dict.fromkeys(ties.get(name, name) for name in fitting))
    held = {name: why for name in names if (why := _cannot(format, name, opened.spec(name))) is not None}
    if pattern is None:
        names = [name for name in names if name not in held]
    elif held:
        raise Error(next(iter(held.values())))
    if not names:
        if pattern is None:
            raise Error(f"none of {listed(opened)} is usually pruned and fits the layout; name some with pattern=")
        raise Error(f"no tensor to pack fits {pattern=}; there are {listed(opened)}")
    rule: Rule = "2:4" if format == "sparse-24-bitmask" else "bits" if exact else "value"
    reductions = {name: counts_of(opened.node(name), rule) for name in names}
    solve_all(reductions.values(), threads)
    made: dict[str, dict[str, Lazy]] = {}
    for name in names:
        found = reductions[name].value()
        if rule == "2:4" and int(found[0]):
            if pattern is not None:
                raise Error(f"{name}: {int(found[0]):,} groups of four have more than two values; prune to '2:4' first")
            continue
        parts = _parts(format, opened.node(name), rule, [] if rule == "2:4" else places(found))
        if pattern is not None or _bytes(parts) < opened.spec(name).nbytes:
            made[name] = parts
    if not made:
        raise Error("nothing here gets smaller: are these weights pruned? Name with pattern= what to pack all the same")
    step = Step("prune.formats.pack", {"format": format, **({"exact": True} if exact else {})}, (opened.lineage,))
    return Weights(_replaced(opened, made, format), step, _files(opened, format, made), opened.metadata)


def _cannot(format: str, name: str, spec: Spec) -> str | None:
    """Why a layout cannot hold a tensor, if so."""
    if spec.dtype not in _DTYPES:
        return f"{name} is {spec}; what is packed is {', '.join(map(dtype_name, _DTYPES))}"
    if format == "bitmask":
        return None
    if not name.endswith(".weight"):
        return f'{name}: the layout {format} is for names that end in ".weight"; use format="bitmask"'
    if not spec.shape:
        return f"{name} is a single number"
    if format == "sparse-24-bitmask" and (len(spec.shape) != 2 or spec.shape[1] % 4):
        return f"{name} {list(spec.shape)}: the layout {format} is for matrices whose rows are a multiple of 4 long"
    return None


def _rows(format: str, shape: Sequence[int]) -> Rows:
    if format == "bitmask":
        return Rows(1, math.prod(shape))
    return Rows(math.prod(shape[:-1]), shape[-1])


def _parts(format: str, node: Lazy, rule: Rule, begin: list[int]) -> dict[str, Lazy]:
    """The tensors that stand for one, by their endings."""
    shape, rows = node.spec.shape, _rows(format, node.spec.shape)
    if format == "bitmask":
        bits = Bits(node, rule, rows, (-(-rows.total // 8),))
        return {"_compressed": Kept(node, rule, begin), "_bitmask": bits, "_shape": Sizes(shape)}
    bits = Bits(node, rule, rows, (*shape[:-1], -(-shape[-1] // 8)))
    if format == "sparse-24-bitmask":
        return {".compressed": KeptOfFour(node), ".bitmask": bits, ".shape": Sizes(shape, column=True)}
    starts: Lazy
    if len(shape) == 2:
        starts = RowStarts(node, rule, begin)
    else:
        told = {"rule": rule, "dtype": dtype_name(node.spec.dtype)}
        starts = apply(_row_offsets, node, unit="tensor", spec=Spec(shape[:-1], torch.int64), options=told)
    return {".compressed": Kept(node, rule, begin), ".bitmask": bits, ".shape": Sizes(shape), ".row_offsets": starts}


def _row_offsets(tensor: Tensor, *, rule: Rule, dtype: str) -> Tensor:
    """What compressed-tensors writes for tensors that are no matrices: their rows added up along the first axis alone.
    It reads these numbers nowhere."""
    counts = kept(tensor.to(as_dtype(dtype)), rule).sum(dim=-1)
    return counts.cumsum(0) - counts


def _bytes(parts: Mapping[str, Lazy]) -> int:
    return sum(part.spec.nbytes for part in parts.values())


def _own(format: str, name: str) -> str:
    """What the names of a tensor's parts begin with."""
    return name if format == "bitmask" else name.removesuffix(".weight")


def _replaced(weights: Weights, made: Mapping[str, Mapping[str, Lazy]], format: str) -> dict[str, Lazy]:
    """The nodes of all tensors, each packed one by its parts; other names of a packed tensor follow it."""
    nodes: dict[str, Lazy] = {}
    for name in weights:
        parts = made.get(weights.ties.get(name, name))
        own = {name: weights.node(name)} if parts is None else {_own(format, name) + e: p for e, p in parts.items()}
        taken = next((one for one in own if one in nodes or (parts is not None and one in weights)), None)
        if taken is not None:
            raise Error(f"{name} cannot be packed: there is a tensor called {taken} already")
        nodes |= own
    return nodes


def _files(weights: Weights, format: str, made: Mapping[str, Mapping[str, Lazy]]) -> dict[str, bytes | Bytes]:
    """No config that anybody could take for that of plain weights; beside it one that says what the layout is."""
    files = dict(weights.files)
    if CONFIG not in files:
        return files
    files[ASIDE] = files.pop(CONFIG)
    parsed = None if format == "bitmask" else _config(files[ASIDE])
    if parsed is None:
        return files
    kept = sum(parts[".compressed"].spec.numel for parts in made.values())
    total = sum(weights.spec(name).numel for name in made)
    earlier = parsed.get("quantization_config")
    parsed["quantization_config"] = (earlier if isinstance(earlier, dict) else {}) | {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": format,
            "targets": sorted(name.removesuffix(".weight") for name in made),
            "ignore": [],
            "global_sparsity": 1 - kept / max(total, 1),
            "sparsity_structure": "2:4" if format == "sparse-24-bitmask" else "unstructured",
        },
    }
    files[THEIRS] = _as_file(parsed)
    return files


def _config(content: bytes | Bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(content_of(content))
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _as_file(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


# The way back


def unpack(weights: Source, *, threads: int | None = None) -> Weights:
    """Dense weights from packed ones, of any of the layouts of `pack`.

    Args:
        weights: what `pack` made, or a folder that compressed-tensors made.
        threads: workers of the counting; default one a core.

    Returns:
        Weights: lazy, under the names and with the config that they had. The bits, a sixteenth of the bytes in bf16,
        are read once here, which finds a damaged file; ``row_offsets`` are not needed.

    Raises:
        ValueError: nothing here is packed, a part is missing, or parts that do not fit together.

    >>> packed = pack({"w": torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0])}, pattern="w")
    >>> unpack(packed)["w"]
    tensor([0., 3., 0., 0., 0.])
    """
    opened = open(weights)
    plans = _plans(opened)
    if not plans:
        raise Error("nothing here is packed: no tensor ends in _compressed or .compressed and has a bitmask beside it")
    reductions = [counts_of_bits(plan.packed, plan.rows) if plan.rows.total else None for plan in plans]
    solve_all([reduction for reduction in reductions if reduction is not None], threads)
    made: dict[object, Lazy] = {}
    parts: dict[str, tuple[str, Lazy]] = {}
    for plan, reduction in zip(plans, reductions, strict=True):
        begin = [0] if reduction is None else places(reduction.value())
        if begin[-1] != plan.values.spec.numel:
            raise FormatError(
                f"{plan.name}: its bits speak of {begin[-1]:,} values, and there are {plan.values.spec.numel:,}"
            )
        dense = Dense(plan.values, plan.packed, plan.rows, plan.shape, begin)
        node = made.setdefault(plan.key, dense)  # names of one tensor stay so
        parts |= dict.fromkeys(plan.parts, (plan.name, node))
    nodes: dict[str, Lazy] = {}
    for name in opened:
        plain, node = parts.get(name, (name, opened.node(name)))
        if name in parts and plain in opened and plain not in parts:
            raise FormatError(f"{plain} is there packed and as it is")
        nodes[plain] = node
    return Weights(nodes, Step("prune.formats.unpack", {}, (opened.lineage,)), _plain_files(opened), opened.metadata)


@dataclass(frozen=True)
class _Plan:
    """What is packed under a name."""

    name: str
    parts: tuple[str, ...]
    values: Lazy
    packed: Lazy
    rows: Rows
    shape: tuple[int, ...]

    @property
    def key(self) -> object:
        """Equal for names of one tensor."""
        return id(self.values), id(self.packed), self.shape


def _plans(weights: Weights) -> list[_Plan]:
    found: dict[str, _Plan] = {}
    lacking: dict[str, str] = {}
    for joint, ending in (("_", ""), (".", ".weight")):
        ends = [joint + part for part in PARTS]
        for own in dict.fromkeys(name.removesuffix(end) for end in ends for name in weights if name.endswith(end)):
            names = [own + end for end in ends]
            missing = [name for name in names if name not in weights]
            if len(missing) == 1:
                lacking[missing[0]] = own + ending
            elif not missing:
                if own + ending in found:
                    raise FormatError(f"{own + ending} is packed twice: as {found[own + ending].parts[0]}, {names[0]}")
                names += [name for name in (f"{own}{joint}row_offsets",) if name in weights]
                found[own + ending] = _plan(weights, ending, own, tuple(names))
    for gone, name in lacking.items():
        if gone not in found:  # what was packed twice is unpacked twice
            raise FormatError(f"{name} is packed, but {gone} is missing")
    return list(found.values())


def _plan(weights: Weights, ending: str, own: str, parts: tuple[str, ...]) -> _Plan:
    values, packed, shape = weights.node(parts[0]), weights.node(parts[1]), _shape(weights, parts[2])
    if ending:
        rows, expected = Rows(math.prod(shape[:-1]), shape[-1]), (*shape[:-1], -(-shape[-1] // 8))
    else:
        rows, expected = Rows(1, math.prod(shape)), (-(-math.prod(shape) // 8),)
    fits = packed.spec == Spec(expected, torch.uint8) and values.spec.numel <= rows.total
    if not fits or values.spec.dtype not in _DTYPES:
        raise FormatError(f"{own}: bits {packed.spec} and values {values.spec} are not those of a tensor {list(shape)}")
    return _Plan(own + ending, parts, values, packed, rows, shape)


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    """The shape that a tensor of sizes says, which may lie."""
    spec = weights.spec(name)
    least = 1 if name.endswith(".shape") else 0
    if not least <= spec.numel <= _MOST_AXES or spec.dtype != torch.int64:
        raise FormatError(f"{name} is {spec}, not the sizes of a tensor's axes")
    shape = tuple(weights[name].reshape(-1).tolist())
    if any(size < 0 for size in shape):
        raise FormatError(f"{name} says {list(shape)}: a size cannot be negative")
    return shape


def _plain_files(weights: Weights) -> dict[str, bytes | Bytes]:
    """The files, with a config.json that does not speak of packing."""
    files = dict(weights.files)
    files.pop(THEIRS, None)
    aside = files.pop(ASIDE, None)
    parsed = _config(files[CONFIG]) if CONFIG in files else None
    said = parsed and parsed.get("quantization_config")
    speaks = isinstance(said, dict) and said.pop("sparsity_config", None) is not None
    if aside is not None and (speaks or CONFIG not in files):
        files[CONFIG] = aside
    elif parsed is not None and isinstance(said, dict) and speaks:
        if not said.keys() - {"quant_method", "transform_config", "version"}:
            del parsed["quantization_config"]
        files[CONFIG] = _as_file(parsed)
    return files


# What it brings


def sizes(packed: Source) -> Report:
    """How many bytes packed weights take, and took before.

    Args:
        packed: what `pack` made, or a folder of it; only headers are read, and shapes.

    Returns:
        Report: a row a packed tensor: ``kept`` (share of its entries), ``before``, ``after`` (bytes, with bits, shape
        and offsets) and ``after, share``. The figures are of all tensors, packed or not.

    Raises:
        ValueError: nothing here is packed.

    >>> found = sizes(pack({"w": torch.zeros(100, 100)}, pattern="w"))
    >>> found["before"], found["after"]
    ([40000], [1266])
    """
    from weightsmith.inspect import Report

    opened = open(packed)
    plans = _plans(opened)
    if not plans:
        raise Error("nothing here is packed")
    seen: set[object] = set()
    rows = []
    for plan in plans:
        if plan.key in seen:
            continue
        seen.add(plan.key)
        before = plan.rows.total * plan.values.spec.dtype.itemsize
        after = sum(opened.spec(part).nbytes for part in plan.parts)
        rows.append(
            {
                "tensor": plan.name,
                "shape": "x".join(map(str, plan.shape)),
                "kept": plan.values.spec.numel / max(plan.rows.total, 1),
                "before": before,
                "after": after,
                "after, share": after / max(before, 1),
            }
        )
    told = sum(row["after"] for row in rows)
    others = opened.nbytes - told
    before = others + sum(row["before"] for row in rows)
    figures = {
        "packed tensors": len(rows),
        "bytes before": before,
        "bytes after": before - sum(row["before"] - row["after"] for row in rows),
        "after, share": opened.nbytes / max(before, 1),
    }
    notes = ["On disk only: packed weights are unpacked before they are used, and then take what they took before."]
    return Report("Packed weights", figures, rows, notes=notes)
