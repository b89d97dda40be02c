"""Units made larger or smaller where they are written, and the other way round where they are read.

A factor passes through everything linear, and a positive one through everything positively homogeneous, so it can be
moved from one matrix into the next: what equalises ranges before quantizing, balances training, and folds the gain of
a norm into what reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.graph._axes import Sum, spaces_of
from weightsmith.graph._take import checked, moved, positions
from weightsmith.graph._units import Member, UnitGraph
from weightsmith.weights import Entire, Lazy, Pattern, Weights, apply, matches

_NEVER = {
    "softmax": "a softmax over its units does not let factors through",
    "reduced": "its units are summed, averaged or maximised, and a factor of one unit cannot be undone after that",
    "tokens": "its units are the inputs' numbers",
}
_NORMS = frozenset({"rms_norm", "layer_norm", "group_norm"})


def scale(
    weights: Any,
    graph: UnitGraph,
    factors: Mapping[str, Any],
    *,
    writers: Pattern | None = None,
    readers: Pattern | None = None,
) -> Weights:
    """What writes a unit times a factor, what reads it divided by it: the same function.

    Which flags allow it is told in the table of ``graph/_verbs.py``. Of a gated MLP (``product``) only the writer that
    is not bent is scaled. Where the graph cannot tell who writes the values that are read, say it with ``writers``:

    - ``batch_norm``: the gain and the bias of the norm, not the matrix before it, and every bias after it;
    - ``score``: one of the two sides; the other is divided;
    - a norm over the units: its gain (and bias), and in ``readers`` all that reads what it puts out.

    Args:
        weights: what `weightsmith.open` opens, with the tensors of the graph.
        graph: their graph.
        factors: space -> ``[units]``, none of them 0.
        writers: names of what is multiplied, where it is not all that writes.
        readers: names of what is divided, where it is not all that reads.

    Returns:
        The weights, lazily, in their dtypes.

    Raises:
        Error: a factor that is 0 or no number, or a space whose flags and tensors do not allow it.

    >>> from weightsmith.graph import declare
    >>> weights = {"up": torch.tensor([[1.0], [2.0]]), "down": torch.tensor([[10.0, 20.0]])}
    >>> graph = declare(weights, {"up": "> hidden, 1", "down": "1, < hidden"})
    >>> scale(weights, graph, {"hidden": [1.0, 4.0]}).to_dict()
    {'up': tensor([[1.],
            [8.]]), 'down': tensor([[10.,  5.]])}
    """
    found = checked(weights, graph)
    plan: dict[tuple[str, int], Tensor] = {}
    for name, given in factors.items():
        factor = _factors(graph, name, given)
        many, few = _sides(graph, name, factor, writers, readers)
        for places, value in ((many, factor), (few, 1 / factor)):
            wanted = {(member.tensor, member.dim) for member in places}
            for place, by_position in positions(graph, {name: value}, lambda *p, w=wanted: p in w).items():
                plan[place] = plan[place] * by_position if place in plan else by_position
    return moved(found, graph, {}, plan, "graph.scale", {"spaces": sorted(factors)})


def fold(
    weights: Any, graph: UnitGraph, gains: Mapping[str, Sequence[str]] | None = None, *, offset: float = 0.0
) -> Weights:
    r"""The gains of norms moved into the matrices that read them; the gains become one.

    .. math:: W (g \odot \hat x + b) = (W \operatorname{diag} g)(\hat x + b / g)

    Args:
        weights: what `weightsmith.open` opens, with the tensors of the graph.
        graph: their graph.
        gains: gain -> names of **all** the tensors that read what its norm puts out. That nothing else reads it, a
            residual connection for one, is for the caller to know: a graph tells who reads a stream, not at which
            place. Left out, `norm_readers` finds the pairs in names that it knows.
        offset: what the network adds to a stored gain: 1 where gains are stored less one.

    Returns:
        The weights, lazily. A bias of the norm (the gain's name with ``bias`` for ``weight``) is divided by the gain.

    Raises:
        Error: a tensor does not read the space of the gain, is named twice, or is tied to one that writes it; or a
            gain is 0 where a bias must be divided by it (when it is read).

    >>> from weightsmith.graph import declare
    >>> weights = {"norm": torch.tensor([2.0, 4.0]), "up": torch.tensor([[1.0, 1.0]])}
    >>> graph = declare(weights, {"norm": "stream", "up": "1, < stream"}, spaces={"stream": {"flags": ["rms_norm"]}})
    >>> fold(weights, graph, {"norm": ["up"]}).to_dict()
    {'norm': tensor([1., 1.]), 'up': tensor([[2., 4.]])}
    """
    found = checked(weights, graph)
    pairs = norm_readers(graph) if gains is None else gains
    by_reader: dict[str, tuple[str, int]] = {}
    biases: dict[str, str] = {}
    for gain, readers in pairs.items():
        space = _space_of_gain(graph, gain)
        for reader in readers:
            if reader in by_reader:
                raise Error(f"fold: {reader} is said to read both {by_reader[reader][0]} and {gain}")
            by_reader[reader] = (gain, _reading(graph, reader, space, gain))
        bias = re.sub(r"(^|\.)weight$", r"\1bias", gain)
        if bias != gain and bias in graph.tensors:
            biases[bias] = gain
    touched = {**{reader: gain for reader, (gain, _) in by_reader.items()}, **biases, **dict.fromkeys(pairs, "")}
    for alias, name in found.ties.items():
        if touched.get(alias) != touched.get(name):
            raise Error(f"fold: {alias} and {name} are one tensor, of which only one is folded; see graph.untie")

    def build(name: str, node: Lazy) -> Lazy:
        if name in pairs:
            return apply(_ones, node, spec=node.spec, options={"value": 1.0 - offset})
        if name in biases:
            return apply(_divided, node, found.node(biases[name]), spec=node.spec, options={"offset": offset})
        if name not in by_reader:
            return node
        gain, dim = by_reader[name]
        options = {"dim": dim, "offset": offset}
        return apply(
            _folded, node, Entire(found.node(gain)), unit="row" if dim else "tensor", spec=node.spec, options=options
        )

    return found.zip_nodes(build, (), "graph.fold", {"gains": sorted(pairs)})


# Norms before blocks, by the names that a block gives them: gain -> what reads it, beside or inside the block.
_READERS = (
    (r"input_layernorm|ln_1|norm_1|norm1|layernorm_before|attention_norm|self_attn_layer_norm|attn_norm",
     r"((self_)?(attn|attention)(\.attention|\.self)?)\.(q_proj|k_proj|v_proj|qkv_proj|c_attn|qkv|query_key_value|"
     r"query|key|value|Wqkv|wq|wk|wv|in_proj)"),
    (r"post_attention_layernorm|ln_2|norm_2|norm2|layernorm_after|ffn_norm|final_layer_norm|mlp_norm",
     r"((mlp|feed_forward|intermediate|ffn|block_sparse_moe)\.)?(experts\.\d+\.)?"
     r"(gate_proj|up_proj|gate_up_proj|c_fc|fc1|dense|dense_h_to_4h|w1|w3|linear1|gate|router)"),
    (r"norm|layernorm|ln_f|final_layernorm|final_norm|final_layer_norm",
     r"lm_head|embed_out|output|head|classifier|score"),
)  # fmt: skip


def norm_readers(graph: UnitGraph) -> dict[str, list[str]]:
    """Which tensors read each norm's gain, found from the names that blocks with a norm before them have.

    Every gain of a space and every tensor that reads it must find its partner, so what is not understood is an error
    and not a guess.

    Returns:
        Gain -> readers, as `fold` takes them.

    Raises:
        Error: no space has gains of norms, or a gain or a reader has no partner.

    >>> from weightsmith.graph import declare
    >>> weights = {"h.0.ln_1.weight": torch.ones(2), "h.0.attn.c_attn.weight": torch.ones(2, 6)}
    >>> rules = {"h.{}.ln_1.weight": "stream", "h.{}.attn.c_attn.weight": "< stream, 6"}
    >>> graph = declare(weights, rules, spaces={"stream": {"flags": ["layer_norm"]}})
    >>> norm_readers(graph)
    {'h.0.ln_1.weight': ['h.0.attn.c_attn.weight']}
    """
    spaces = [name for name, space in graph.spaces.items() if space.flags & _NORMS and len(graph.members(name)) > 1]
    pairs: dict[str, list[str]] = {}
    for space in spaces:
        members = graph.members(space)
        whole = [m for m in members if len(graph.tensors[m.tensor]) == 1 and not m.use.reads and not m.use.writes]
        readers = [m.tensor for m in members if m.use.reads and m.tensor not in {one.tensor for one in whole}]
        if not readers:
            continue  # the norm of queries or keys: its gain is read by the scores
        for gain in [m.tensor for m in whole]:
            pairs[gain] = [reader for reader in readers if _reads_gain(gain, reader)]
        claimed = [reader for gain in pairs for reader in pairs[gain]]
        lonely = [n for n in pairs if not pairs[n]] + [n for n in readers if claimed.count(n) != 1]
        if lonely:
            raise Error(
                f"no norm and reader in {space} could be brought together for {listed(lonely)}; say it: "
                "fold(weights, graph, {gain: [all that reads it]})"
            )
    if not pairs:
        raise Error("no space of the graph has the gain of a norm that tensors read")
    return pairs


def _reads_gain(gain: str, reader: str) -> bool:
    block, _, norm = _stem(gain).rpartition(".")
    for norms, readers in _READERS[:2]:
        if re.fullmatch(norms, norm) and re.fullmatch(rf"{re.escape(block)}\.({readers})", _stem(reader)) and block:
            return True
    # The last norm stands in the trunk, its reader in the model around it.
    norms, readers = _READERS[2]
    around, _, head = _stem(reader).rpartition(".")
    return bool(
        re.fullmatch(norms, norm) and re.fullmatch(readers, head)
        and (block == around or block.startswith(f"{around}." if around else "")) and not re.search(r"\d", block)
    )  # fmt: skip


def _stem(name: str) -> str:
    return re.sub(r"(\.weight|_weight)$", "", name)


def _factors(graph: UnitGraph, name: str, given: Any) -> Tensor:
    factor, size = torch.as_tensor(given).detach().cpu().double().flatten(), graph.space(name).size
    if len(factor) != size:
        raise Error(f"scale: the space {name} has {size} units, got {len(factor)} factors")
    if not factor.isfinite().all() or (factor == 0).any():
        raise Error(f"scale: the factors of {name} must be finite and not 0")
    if "homogeneous" in graph.space(name).flags and (factor < 0).any():
        raise Error(f"scale: {name} has the flag homogeneous, which lets only factors above 0 through")
    return factor


def _sides(
    graph: UnitGraph, name: str, factor: Tensor, writers: Pattern | None, readers: Pattern | None
) -> tuple[list[Member], list[Member]]:
    """What is multiplied and what divided, or an error that says why that would change the function."""
    flags, members = graph.space(name).flags, graph.members(name)
    for flag in sorted(flags & _NEVER.keys()):
        raise Error(f"scale: the space {name} has the flag {flag}: {_NEVER[flag]}")
    few = [m for m in members if m.use.reads and (readers is None or matches(readers, m.tensor))]
    many = [m for m in members if not m.use.reads and matches(writers, m.tensor)] if writers is not None else [
        m for m in members if m.use.writes]  # fmt: skip
    if writers is not None and not many:
        raise Error(f"scale: no tensor that writes or acts on {name} fits writers={writers!r}")
    if flags & _NORMS and (
        writers is None or readers is None or any(len(graph.tensors[m.tensor]) != 1 for m in many) or not few
    ):
        raise Error(
            f"scale: the space {name} has the flag {sorted(flags & _NORMS)[0]}: a norm over its units does not let "
            "factors through; say the norm's gain (and bias) with writers= and all that reads it with readers="
        )
    if "batch_norm" in flags and writers is None:
        raise Error(
            f"scale: the space {name} has the flag batch_norm, which undoes factors that are put before it; say the "
            "norm's gain and bias with writers="
        )
    if "score" in flags:
        if writers is None:
            raise Error(f"scale: the space {name} has the flag score; say one of the two sides with writers=")
        named = {m.tensor for m in many}
        few = few + [m for m in members if m.use.writes and m.tensor not in named]
    elif writers is None:
        many = _unbent(graph, name, many)
    else:
        _check_unbent(graph, name, many)
    if not many:
        raise Error(f"scale: no tensor writes the space {name}, so no factor can be put on its values")
    if not few:
        raise Error(f"scale: no tensor reads the space {name}, so its values leave the network")
    both = [m.tensor for m in members if m.use.reads and m.use.writes]
    if both:
        raise Error(f"scale: {listed(both)} both writes and reads {name} along one dimension; see graph.untie")
    return many, few


def _unbent(graph: UnitGraph, name: str, writers: list[Member]) -> list[Member]:
    """The writers whose factor arrives where the space is read."""
    flags = graph.space(name).flags
    bent = [m for m in writers if _bends(graph, name, m)]
    plain = [m for m in writers if m not in bent]
    if "product" in flags or any(_scored(graph, name, m) for m in writers):
        if not bent or len({m.tensor.rpartition(".")[0] for m in plain}) != 1:  # two may be multiplied, or added
            raise Error(
                f"scale: streams are multiplied in {name}, and which of {listed(m.tensor for m in writers)} may carry "
                "the factor is not told; say it with writers="
            )
        return plain
    if bent:
        raise Error(f"scale: what {bent[0].tensor} writes to {name} is bent (nonlinear), which lets no factors through")
    if "nonlinear" in flags:
        raise Error(f"scale: the space {name} has the flag nonlinear: a function bends it that lets no factors through")
    return plain


def _check_unbent(graph: UnitGraph, name: str, writers: Iterable[Member]) -> None:
    bent = next((m for m in writers if _bends(graph, name, m)), None)
    if bent is not None:
        raise Error(f"scale: what {bent.tensor} writes to {name} is bent (nonlinear), which lets no factors through")


def _bends(graph: UnitGraph, name: str, member: Member) -> bool:
    """Whether what a tensor writes passes a function that is not positively homogeneous."""
    flags = graph.space(name).flags
    return _scored(graph, name, member) or (
        member.use.bent and not ("homogeneous" in flags and "nonlinear" not in flags)
    )


def _scored(graph: UnitGraph, name: str, member: Member) -> bool:
    """Whether a tensor writes queries or keys: what comes of them is a softmax's."""
    axis = member.use.axis
    terms = [spaces_of(term) for term in (axis.parts if isinstance(axis, Sum) else (axis,))]
    scored = [any("score" in graph.spaces[other].flags for other in each if other != name)
              for each in terms if name in each]  # fmt: skip
    if any(scored) and not all(scored):
        raise Error(f"scale: {member.tensor} writes both scores and values to {name}, and one factor cannot pass both")
    return any(scored)


def _space_of_gain(graph: UnitGraph, gain: str) -> str:
    if gain not in graph.tensors:
        raise Error(f"fold: the graph has no tensor {gain!r}{did_you_mean(gain, graph.tensors)}")
    spaces = [space for use in graph.tensors[gain] for space in spaces_of(use.axis)]
    if len(graph.tensors[gain]) != 1 or len(spaces) != 1:
        raise Error(f"fold: {gain} is no gain: it has the axes {', '.join(map(str, graph.tensors[gain]))}")
    return spaces[0]


def _reading(graph: UnitGraph, reader: str, space: str, gain: str) -> int:
    """The dimension along which a tensor reads a gain's space."""
    if reader not in graph.tensors:
        raise Error(f"fold: the graph has no tensor {reader!r}{did_you_mean(reader, graph.tensors)}")
    axis = graph.tensors[gain][0].axis
    dims = [dim for dim, use in enumerate(graph.tensors[reader]) if use.reads and space in spaces_of(use.axis)]
    if len(dims) != 1 or graph.tensors[reader][dims[0]].axis != axis:
        raise Error(f"fold: {reader} does not read {axis} as {gain} has it")
    if graph.tensors[reader][dims[0]].writes:
        raise Error(f"fold: {reader} both writes and reads {space} along one dimension; make it two with graph.untie")
    return dims[0]


def _ones(gain: Tensor, *, value: float) -> Tensor:
    return torch.full_like(gain, value)


def _folded(reader: Tensor, gain: Tensor, *, dim: int, offset: float) -> Tensor:
    shape = [-1 if other == dim else 1 for other in range(reader.dim())]
    return reader * (gain.to(reader) + offset).view(shape)


def _divided(bias: Tensor, gain: Tensor, *, offset: float) -> Tensor:
    full = gain.to(bias) + offset
    if ((full == 0) & (bias != 0)).any():
        raise Error("a gain is 0 where the bias of its norm is not, so the bias cannot be divided by it")
    return torch.where(full == 0, torch.zeros_like(bias), bias / torch.where(full == 0, torch.ones_like(full), full))
