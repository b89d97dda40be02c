"""How codes lie in files, and the way back.

``layer.weight`` becomes ``layer.weight_packed``, its codes without gaps; ``layer.weight_scale`` and what else its grid
stores; and ``layer.weight_shape``. Symmetric integers are thereby the ``pack-quantized`` layout of compressed-tensors,
which a config.json then tells of. Every other grid is told of in the header alone, and config.json is put aside, so
that no other program takes the folder for one that it knows.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, FormatError
from weightsmith.prune import prunable
from weightsmith.quantize._coded import Coded, group_count
from weightsmith.quantize._parts import pack, packed_width, unpack
from weightsmith.quantize.grids import Grid, Integer, Packing, described, restored
from weightsmith.weights import Inputs, Lazy, Output, Spec, Step, Weights, Work, as_dtype
from weightsmith.weights._files import Bytes, content_of

METADATA = "weightsmith.quantization"
"""Under this word the header tells of the grid of every quantized tensor."""

CONFIG, ASIDE = "config.json", "config.unquantized.json"

_MOST_AXES = 8  # of a weight; more is a damaged file
EMBEDDING = re.compile(r"(^|[._])(embed\w*|\w+embeddings?|wte|wpe)$")
_EXPERTS = re.compile(r"(^|\.)(\w*experts?\w*)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """How one tensor is taken for a matrix, and on which grid.

    Attributes:
        shape: of the tensor.
        grid: its grid.
        padding: zeros after the inputs of each row.
        experts: matrices that lie behind one another; 0 where the tensor is one matrix.
    """

    shape: tuple[int, ...]
    grid: Grid
    padding: int = 0
    experts: int = 0

    @classmethod
    def of(cls, name: str, spec: Spec, grid: Grid) -> Layout:
        """Fused experts ``[experts, out, in]`` are known by their name and their three axes."""
        fused = len(spec.shape) == 3 and _EXPERTS.search(name) is not None
        return cls(tuple(spec.shape), grid, experts=spec.shape[0] if fused else 0)

    @property
    def inputs(self) -> int:
        """Of a row, without padding."""
        return math.prod(self.shape[2:] if self.experts else self.shape[1:])

    @property
    def rows(self) -> int:
        return self.shape[0] * (self.shape[1] if self.experts else 1)

    @property
    def width(self) -> int:
        """Codes of a row."""
        return self.inputs + self.padding

    def matrix(self, weight: Tensor) -> Tensor:
        """The tensor, or a run of its first axis, as rows ``[rows, width]``, float32 or wider."""
        per = self.shape[1] if self.experts else 1
        rows = weight.reshape(len(weight) * per, self.inputs)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return torch.nn.functional.pad(rows, (0, self.padding)) if self.padding else rows

    def padded(self, gram: Tensor) -> Tensor:
        """A Gram matrix of the inputs and those that pad them, which are always zero."""
        if not self.padding:
            return gram
        if gram.dim() == 3 and gram.shape[1] != self.inputs:
            gram = torch.block_diag(*gram)
        return torch.nn.functional.pad(gram, (0, self.padding) * min(gram.dim(), 2))


def endings_of(layout: Layout) -> dict[str, Spec]:
    """What a tensor becomes, but for its shape."""
    rows, grid = layout.rows, layout.grid
    words = grid.words(layout.width) if isinstance(grid, Packing) else packed_width(layout.width, grid.bits)
    found = {"_packed": Spec((rows, words), torch.int32)}
    groups = group_count(layout.width, grid.group)
    for name, stored in grid.stored().items():
        tail = tuple(size if isinstance(size, int) else layout.width for size in stored.tail)
        shape: tuple[int, ...] = tail if stored.shared else (rows, groups, *tail)
        found[f"_{name}"] = Spec(shape, stored.dtype)
    return found


def parts_of(coded: Coded, layout: Layout) -> dict[str, Tensor]:
    """What is written of codes, by its ending."""
    grid = layout.grid
    if isinstance(grid, Packing):
        found = {"_packed": grid.packed(coded.codes, {**coded.shared, **coded.params})}
    else:
        found = {"_packed": pack(coded.codes, grid.bits)}
    for name, stored in layout.grid.stored().items():
        found[f"_{name}"] = (coded.shared if stored.shared else coded.params)[name].to(stored.dtype)
    return found


def with_codes(
    weights: Weights, coded: Mapping[str, Mapping[str, Lazy]], layouts: Mapping[str, Layout], step: Step
) -> Weights:
    """The weights with some tensors as codes; aliases of a coded tensor follow it."""
    nodes: dict[str, Lazy] = {}
    for name in weights:
        parts = coded.get(weights.ties.get(name, name))
        if parts is None:
            nodes[name] = weights.node(name)
        else:
            nodes |= {name + ending: part for ending, part in parts.items()}
    earlier = json.loads(weights.metadata.get(METADATA, "{}"))
    ties = weights.ties
    owners = {name: layouts.get(ties.get(name, name)) for name in weights}
    said = earlier | {name: _said(layout) for name, layout in owners.items() if layout is not None}
    metadata = {**weights.metadata, METADATA: json.dumps(said)}
    return Weights(nodes, step, with_config(weights, layouts), metadata)


def _said(layout: Layout) -> dict[str, Any]:
    said = described(layout.grid)
    if layout.padding:
        said["padding"] = layout.padding
    return said


# config.json


def with_config(weights: Weights, layouts: Mapping[str, Layout]) -> dict[str, bytes | Bytes]:
    """The files, with a config.json that tells transformers and vLLM of the codes, or put aside if it cannot."""
    files = plain_files(weights)
    parsed = config_of(weights.with_files(files)) if CONFIG in files else None
    if parsed is None:
        return files
    schemes = {name: _scheme(layout) for name, layout in layouts.items()}
    if None in schemes.values() or embeddings(layouts) or METADATA in weights.metadata or tied_codes(weights, layouts):
        files[ASIDE] = files.pop(CONFIG)
        return files
    found = {name: (PACKED, scheme, None) for name, scheme in schemes.items() if scheme is not None}
    parsed["quantization_config"] = compressed_words(found, whole_matrices(weights, layouts))
    files[CONFIG] = as_file(parsed)
    return files


PACKED = "pack-quantized"

Scheme = tuple[str, dict[str, Any], dict[str, Any] | None]
"""A format of compressed-tensors, and its words for the weights and the inputs of a layer."""


def _scheme(layout: Layout) -> dict[str, Any] | None:
    """A tensor's grid in the words of compressed-tensors, or None where what is written is not its layout."""
    grid = layout.grid
    plain = isinstance(grid, Integer) and grid.symmetric and not grid.per_tensor
    return integer_scheme(layout) if plain and grid.bits > 1 and fills(layout) else None


def fills(layout: Layout) -> bool:
    """Whether a tensor is a matrix whose rows are whole groups, which is all that other programs know."""
    group = layout.grid.group
    return len(layout.shape) == 2 and not layout.padding and not (group and layout.inputs % group)


def integer_scheme(layout: Layout) -> dict[str, Any]:
    """An evenly spaced grid in the words of compressed-tensors."""
    grid: Any = layout.grid
    strategy = "tensor" if grid.per_tensor else "group" if grid.group else "channel"
    scheme = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": strategy}
    return scheme | ({"group_size": grid.group} if grid.group else {})


def tied_codes(weights: Weights, coded: Container[str]) -> list[str]:
    """Other names of coded tensors: no other program shares codes. So is a head that shares a coded embedding."""
    found = [name for name, first in weights.ties.items() if first in coded]
    if (config_of(weights) or {}).get("tie_word_embeddings"):
        usual = set(prunable(weights))
        found += [name for name in weights if name in coded and name not in usual]
    return found


def embeddings(names: Iterable[str]) -> list[str]:
    """Those that are looked up and not multiplied with, by their names."""
    return [name for name in names if EMBEDDING.search(name.removesuffix(".weight"))]


def whole_matrices(weights: Weights, coded: Container[str]) -> list[str]:
    """The modules of matrices that are not coded; with the head, which is often not in the file and a Linear too."""
    matrices = {name for name in weights.names("*.weight", floating=True) if len(weights.spec(name).shape) == 2}
    named = {name for name in {*matrices, "lm_head.weight"} if weights.ties.get(name, name) not in coded}
    return sorted(name.removesuffix(".weight") for name in named)


def compressed_words(schemes: Mapping[str, Scheme], whole: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors."""
    groups: dict[str, tuple[Scheme, list[str]]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme), (scheme, []))[1].append(name.removesuffix(".weight"))
    modules = [name.removesuffix(".weight") for name in schemes]
    alone = len(groups) == 1
    said: dict[str, Any] = {}
    for index, ((format, scheme, inputs), targets) in enumerate(groups.values()):
        words = ["Linear"] if alone else anywhere(targets, [*modules, *whole])
        said[f"group_{index}"] = {"targets": words, "weights": scheme, "format": format} | (
            {"input_activations": inputs} if inputs else {}
        )
    formats = {scheme[0] for scheme, _ in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": said,
        "ignore": anywhere(whole, [*modules, *whole]),
    }


def anywhere(names: list[str], among: list[str]) -> list[str]:
    """Names of modules, so that they are found too when the model is loaded without its head or inside another.

    A class of models with a head calls ``layers.0.up`` what the one without calls ``model.layers.0.up``, or the other
    way round. The first part of a name is therefore left open where it can be missing and the rest is still unique.

    >>> anywhere(["model.layers.0.up"], ["model.layers.0.up", "lm_head"])
    ['re:(.*\\\\.)?layers\\\\.0\\\\.up$']
    """
    rests = Counter(name.split(".", 1)[-1] for name in among)
    found = []
    for name in names:
        rest = name.partition(".")[2]
        inner = rest if rest.count(".") >= 2 and not rest[0].isdigit() and rests[rest] == 1 else name
        found.append(f"re:(.*\\.)?{re.escape(inner)}$" if "." in inner else name)
    return found


def config_of(weights: Weights) -> dict[str, Any] | None:
    """config.json, if it is there and can be read."""
    config = weights.files.get(CONFIG)
    if config is None:
        return None
    try:
        parsed = json.loads(content_of(config))
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def as_file(config: Mapping[str, Any]) -> bytes:
    """A config as it is written."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def plain_files(weights: Weights) -> dict[str, bytes | Bytes]:
    """The files, with a config.json that does not speak of codes."""
    files = dict(weights.files)
    aside = files.pop(ASIDE, None)
    if aside is not None and CONFIG not in files:
        files[CONFIG] = aside
        return files
    parsed = config_of(weights)
    if parsed is not None and parsed.pop("quantization_config", None) is not None:
        files[CONFIG] = as_file(parsed)
    return files


# The way back


def dequantize(weights: Any, dtype: torch.dtype | str | None = None) -> Weights:
    """Float weights from codes, lazily: ``layer.weight`` from ``layer.weight_packed`` and its like.

    Args:
        weights: what a method of this room made, or a folder in a format of `weightsmith.quantize.formats`.
        dtype: of the result; that of the scales by default.

    Raises:
        Error: nothing in it is quantized, or it does not say on which grid.

    >>> w = Weights.of({"l.weight": torch.tensor([[7.5, -7.5, 1.0, 0.4]])})
    >>> dequantize(ws.quantize.rtn(w))["l.weight"]
    tensor([[ 7., -8.,  1.,  0.]])
    """
    from weightsmith.quantize.formats import unpack

    return unpack(weights, dtype)


def decoded(weights: Weights, dtype: torch.dtype | str | None = None) -> Weights:
    """Float weights from codes in our own layout."""
    layouts = layouts_of(weights)
    made: dict[int, Lazy] = {}
    nodes: dict[str, Lazy] = {}
    for name, layout in layouts.items():
        packed = weights.node(f"{name}_packed")
        if id(packed) not in made:
            made[id(packed)] = _decoded(weights, name, layout, dtype)
        nodes[name] = made[id(packed)]
    return put_back(weights, nodes, endings_by_name(layouts))


def endings_by_name(layouts: Mapping[str, Layout]) -> dict[str, tuple[str, ...]]:
    """The tensors that stand for each coded one."""
    return {
        name: tuple(name + ending for ending in (*endings_of(layout), "_shape")) for name, layout in layouts.items()
    }


def put_back(
    weights: Weights,
    nodes: Mapping[str, Lazy],
    parts: Mapping[str, tuple[str, ...]],
    *,
    step: str = "quantize.dequantize",
) -> Weights:
    """The weights with tensors in the place of the parts that stood for them, and a config without codes.

    Args:
        nodes: what the tensors have become.
        parts: for each, the names that it stands for.
    """
    first = {names[0]: name for name, names in parts.items()}
    consumed = {part for names in parts.values() for part in names}
    found: dict[str, Lazy] = {}
    for name in weights:
        if name in first:
            found[first[name]] = nodes[first[name]]
        elif name not in consumed:
            found[name] = weights.node(name)
    metadata = {key: word for key, word in weights.metadata.items() if key != METADATA}
    return Weights(found, Step(step, {}, (weights.lineage,)), plain_files(weights), metadata)


def layouts_of(weights: Weights) -> dict[str, Layout]:
    """How every quantized tensor lies, by the words of the header, which are untrusted.

    Raises:
        Error: there are no codes of ours.
        FormatError: the words and the tensors contradict each other.
    """
    names = [name.removesuffix("_packed") for name in weights if name.endswith("_packed")]
    if not names:
        raise Error("nothing here is quantized: no tensor ends in _packed")
    if METADATA not in weights.metadata:
        raise Error("these weights do not say on which grid they are coded: their header has no word of it")
    said = _said_by_header(weights)
    aliases = {alias.removesuffix("_packed"): first for alias, first in weights.ties.items()}
    found = {}
    for name in names:
        own = said.get(name, said.get(aliases.get(name, "").removesuffix("_packed")))
        if own is None:
            raise FormatError(f"nothing says on which grid {name} is coded")
        if f"{name}_shape" not in weights:
            raise FormatError(f"{name} is quantized, but {name}_shape is missing")
        padding = own.get("padding", 0)
        try:
            grid = restored({key: value for key, value in own.items() if key != "padding"})
        except Error as error:
            raise FormatError(f"{name}: {error}") from None
        shape = told_shape(weights, f"{name}_shape")
        if not isinstance(padding, int) or not 0 <= padding <= (grid.group or 0):
            raise FormatError(f"{name}: the header says a padding of {padding!r}")
        layout = replace(Layout.of(name, Spec(shape, torch.float32), grid), padding=padding)
        found[name] = _checked(weights, name, layout)
    return found


def _said_by_header(weights: Weights) -> dict[str, dict[str, Any]]:
    try:
        said = json.loads(weights.metadata[METADATA])
        if not said or not all(isinstance(entry, dict) for entry in said.values()):
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise FormatError(f"the header's words {METADATA} do not tell the grid of every quantized tensor") from None
    return said


def _checked(weights: Weights, name: str, layout: Layout) -> Layout:
    """The layout with scales in the dtype that they have, if all tensors fit it."""
    for ending in ("_zero_point", "_g_idx", "_minimum", "_levels"):
        if name + ending in weights and ending not in endings_of(layout):
            raise Error(f"{name} is coded with {name + ending}, which is not understood yet")
    for ending, expected in endings_of(layout).items():
        if name + ending not in weights:
            raise FormatError(f"{name} is quantized, but {name + ending} is missing")
        spec = weights.spec(name + ending)
        fits = spec.shape == expected.shape and spec.dtype.is_floating_point == expected.dtype.is_floating_point
        if not fits or (ending == "_packed" and spec.dtype != torch.int32):
            raise FormatError(
                f"{name}: {name + ending} is {spec}, and {layout.grid.bits}-bit codes of {list(layout.shape)} on this "
                f"grid have {expected}"
            )
    return layout


def _decoded(weights: Weights, name: str, layout: Layout, dtype: torch.dtype | str | None) -> Lazy:
    endings = list(endings_of(layout))
    arguments = [weights.node(name + ending) for ending in endings]
    own = [node.spec.dtype for node, ending in zip(arguments, endings, strict=True) if ending != "_packed"]
    floating = [one for one in own if one.is_floating_point and one.itemsize > 1]
    default = floating[0] if floating else torch.float32
    spec = Spec(layout.shape, default if dtype is None else as_dtype(dtype))
    alone = any(stored.shared for stored in layout.grid.stored().values()) or layout.experts > 0
    function = partial(_decode, layout=layout, endings=tuple(endings))
    return Output(Work(function, Inputs(arguments, "tensor" if alone else "row"), {"": spec}))


def _decode(packed: Tensor, *params: Tensor, layout: Layout, endings: tuple[str, ...]) -> Tensor:
    stored = layout.grid.stored()
    own: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for ending, value in zip(endings[1:], params, strict=True):
        name = ending.removeprefix("_")
        wide = value.float() if value.dtype.is_floating_point and value.dtype != torch.float64 else value
        (shared if stored[name].shared else own)[name] = wide
    if isinstance(layout.grid, Packing):
        codes = layout.grid.unpacked(packed, layout.width, {**shared, **own})
    else:
        codes = unpack(packed, layout.grid.bits, layout.width)
    values = Coded(codes, own, layout.grid, shared).values()
    return (
        values[:, : layout.inputs].reshape(-1, *layout.shape[1:])
        if layout.inputs
        else values.reshape(len(packed), *layout.shape[1:])
    )


def told_shape(weights: Weights, name: str) -> tuple[int, ...]:
    """The shape that a ``_shape`` tensor says, which may lie."""
    spec = weights.spec(name)
    if len(spec.shape) != 1 or not 1 <= spec.shape[0] <= _MOST_AXES or spec.dtype.is_floating_point:
        raise FormatError(f"{name} is {spec}, not the sizes of a tensor's axes")
    shape = tuple(int(size) for size in weights[name])
    if min(shape) < 0:
        raise FormatError(f"{name} says {list(shape)}: a size cannot be negative")
    return shape
