"""Streams turned so that no unit of them is much larger than the others.

Groups of weights then have no outliers to be as wide as, and neither have the values between layers. The turn is put
into the matrices on both sides of a stream; what comes out is an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith import graph as _graph
from weightsmith.card import card
from weightsmith.errors import Error, listed
from weightsmith.graph import UnitGraph, fold, norm_readers, of, unit_positions, untie
from weightsmith.quantize.transforms._hadamard import (
    hadamard,
    has_hadamard,
    keeping_mean,
    random_orthogonal,
    spreading,
)
from weightsmith.quantize.transforms._parts import divided
from weightsmith.solve import seed_for
from weightsmith.weights import Weights, open, working

Kind = Literal["hadamard", "random"]


@card(
    paper="Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman 2024, 'QuaRot: Outlier-Free "
    "4-Bit Inference in Rotated LLMs'",
    needs=("graph",),
    unit="model",
    claim="groups of weights have fewer outliers, the outputs are the same",
    departs="only turns that can be put into weights: none at run time before the last matrix of an MLP or behind "
    "values, nor of keys; networks whose norms take a mean are turned around the vector of ones",
)
def rotate(
    weights: Any,
    graph: UnitGraph | None = None,
    *,
    stream: Kind | Tensor | None = "hadamard",
    heads: Kind | None = "hadamard",
    seed: int = 0,
    gains: Mapping[str, Sequence[str]] | None = None,
    offset: float = 0.0,
    head: str = "lm_head.weight",
) -> Weights:
    r"""The same network with its residual stream, and values of heads, seen from another side.

    .. math:: x' = Q x, \qquad W'_{\text{reads}} = W Q^\top, \qquad W'_{\text{writes}} = Q W

    Gains of norms are folded into what reads them before, and an embedding that is the output matrix as well is made
    two tensors, since only the one that reads takes in the last gain: a checkpoint with tied embeddings grows by one.

    Weights alone may be harder to round to nearest after it. On 256 words of one text, at 3 bits in groups of 64,
    SmolLM2-135M is off by a KL of 1.6 as it is, 3.2 with its gains folded and nothing turned, and 5.2 turned; 3.1 then
    with the first token computed by exact weights, whose inputs the gains had made small.

    Args:
        weights: what `weightsmith.open` opens.
        graph: the units; by default of the family of a folder.
        stream: how the residual stream is turned: by a `hadamard` matrix with random signs (a random orthogonal one
            where none is known), a ``"random"`` one, a matrix ``[units, units]``, or not at all (None).
        heads: the same for whatever is linear between two matrices, as the width of values of heads.
        seed: of the signs.
        gains, offset: as `weightsmith.graph.fold` takes them.
        head: what the output matrix is called, where it is tied.

    Returns:
        Weights: lazy; of a folder, one that transformers loads.

    Raises:
        Error: norms of which the graph does not tell what reads them, streams that are bent or normalised between
            blocks (norms behind blocks), or a matrix that is not orthogonal.

    >>> from weightsmith.graph import declare
    >>> weights = {"up": torch.eye(2), "down": torch.eye(2)}
    >>> new = rotate(weights, declare(weights, {"up": "> hidden, 2", "down": "2, < hidden"}))
    >>> torch.allclose(new["down"] @ new["up"], torch.eye(2), atol=1e-6)
    True
    """
    opened, graph = open(weights), _given(weights, graph)
    if stream is not None:
        opened, graph = folded(opened, graph, gains, offset=offset, head=head)
        for name in streams(graph):
            opened = _turned_stream(opened, graph, name, stream, seed)
    if heads is not None:
        opened = _turned_heads(opened, graph, lambda name, size: _matrix(heads, size, seed, name))
    return opened


@card(
    paper="Xu, Yue, Hu, Yuan, Cheng, Zhao, Zhong, Chen, Su 2025, 'MambaQuant: Quantizing the Mamba Family with "
    "Variance Aligned Rotation Methods'",
    covers=("mambaquant",),
    needs=("stats.gram", "graph"),
    unit="model",
    claim="all units of a turned stream have one variance, and products of rounded inputs have less error than after "
    "a Hadamard turn alone",
    departs="second moments about zero in place of covariances; the turns that can be put into weights alone, so no "
    "smoothing before turns at run time",
)
def mambaquant(
    weights: Any,
    graph: UnitGraph | None = None,
    *,
    stats: Mapping[str, Tensor],
    gains: Mapping[str, Sequence[str]] | None = None,
    offset: float = 0.0,
    head: str = "lm_head.weight",
) -> Weights:
    r"""`rotate` by matrices under which all units of what is read have the same mean square.

    .. math:: Q = H K^\top, \qquad \Sigma = K \Lambda K^\top, \qquad
        (Q \Sigma Q^\top)_{ii} = \tfrac1n \operatorname{tr} \Sigma

    with :math:`\Sigma` the sum of the Gram matrices of all that reads a stream, after its norms' gains are folded, and
    :math:`H` a Hadamard matrix.

    Args:
        weights, graph, gains, offset, head: as in `rotate`.
        stats: full Gram matrices, of some that read each stream at least (inputs before gains are folded).

    Returns:
        Weights: lazy. A stream of whose readers no Gram matrix is given, or of whose width no Hadamard matrix is
        known, is left as it is.

    Raises:
        Error: norms that take the mean away, or of which the graph does not tell what reads them, and Gram matrices
            that are not finite.

    >>> from weightsmith.graph import declare
    >>> weights = {"up": torch.eye(2), "down": torch.eye(2)}
    >>> graph = declare(weights, {"up": "> hidden, 2", "down": "2, < hidden"})
    >>> new = mambaquant(weights, graph, stats={"down": torch.diag(torch.tensor([9.0, 1.0]))})
    >>> new["up"].abs(), torch.allclose(new["down"] @ new["up"], torch.eye(2), atol=1e-6)
    (tensor([[0.7071, 0.7071],
            [0.7071, 0.7071]]), True)
    """
    opened, graph = open(weights), _given(weights, graph)
    if gains is None:
        gains = norm_readers(folding(opened, graph, head)[1]) if streams(graph) else {}
    moments = {name: _moment(opened, graph, name, stats, gains, offset) for name in graph.spaces}
    opened, graph = folded(opened, graph, gains, offset=offset, head=head)
    for name in streams(graph):
        if "layer_norm" in graph.space(name).flags:
            raise Error(
                f"mambaquant: the norms of {name} take the mean away, which these turns do not keep; see rotate"
            )
        turn = _even(moments.get(name))
        if turn is not None:
            opened = _graph.rotate(opened, graph, name, turn)
    return _turned_heads(opened, graph, lambda name, size: _even(moments.get(name)))


def karhunen_loeve(moment: Tensor) -> Tensor:
    r"""An orthogonal matrix under which all units have the same mean square: :math:`Q = H K^\top`.

    Args:
        moment: ``[n, n]``, the Gram matrix or covariance of the units; n is an order of `hadamard`.

    Returns:
        ``[n, n]`` float64; ``Q x`` are the new units.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 4.0, 8.0])
    >>> moment = x.T @ x
    >>> turn = karhunen_loeve(moment)
    >>> even = (turn @ moment.double() @ turn.T).diagonal()
    >>> bool((even.max() / even.min() - 1).abs() < 1e-9)
    True
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or not moment.isfinite().all():
        raise Error(f"karhunen_loeve is given a finite matrix [n, n], got {list(moment.shape)}")
    wide = moment.double()
    _, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    return hadamard(len(moment)).to(wide.device) @ vectors.T


def folded(
    weights: Weights, graph: UnitGraph, gains: Mapping[str, Sequence[str]] | None = None, *, offset: float = 0.0,
    head: str = "lm_head.weight",
) -> tuple[Weights, UnitGraph]:  # fmt: skip
    """The weights with the gains of the norms of streams in what reads them, embeddings untied, and their graph."""
    if not streams(graph):
        return weights, graph
    weights, graph = folding(weights, graph, head)
    return fold(weights, graph, gains, offset=offset), graph


def folding(weights: Weights, graph: UnitGraph, head: str) -> tuple[Weights, UnitGraph]:
    """The weights with an embedding that is the output matrix as well made two, so that norms can be folded."""
    for space in streams(graph):
        members = graph.members(space)
        tied = [member.tensor for member in members if member.use.reads and member.use.writes]
        if len(tied) > 2:
            raise Error(f"{listed(tied)} are read and written along {space}; make them two each with graph.untie")
        if tied:
            alias = head if head in tied or len(tied) == 1 else tied[1]
            if tied == [alias]:
                raise Error(f"{alias} is read and written along {space}; say with head= what its output matrix becomes")
            weights, graph = untie(weights, graph, alias, next(name for name in tied if name != alias))
            continue
        written = {member.tensor for member in members if member.use.writes}
        for one, other in list(weights.ties.items()):  # the graph may know two tensors where the weights have one
            read = {member.tensor for member in members if member.use.reads} & {one, other}
            if len(read) == 1 and written & {one, other}:
                alias = read.pop()
                weights, graph = untie(weights, graph, alias, other if alias == one else one)
    return weights, graph


def streams(graph: UnitGraph) -> list[str]:
    """The spaces that norms normalise and matrices read: residual streams."""
    return [
        name
        for name, space in graph.spaces.items()
        if space.flags & {"rms_norm", "layer_norm"}
        and not space.flags & {"score", "tokens"}
        and any(member.use.reads for member in graph.members(name))
    ]


def _given(weights: Any, graph: UnitGraph | None) -> UnitGraph:
    if graph is None and isinstance(weights, nn.Module):
        raise Error("of a module the graph is asked for: graph=weightsmith.graph.trace(module, inputs)")
    return of(open(weights)) if graph is None else graph


def _matrix(kind: Kind | Tensor, size: int, seed: int, name: str) -> Tensor:
    if isinstance(kind, Tensor):
        return kind
    if kind not in ("hadamard", "random"):
        raise Error(f"a turn is 'hadamard', 'random', a matrix or None; got {kind!r}")
    own = seed_for(seed, name)
    return spreading(size, seed=own) if kind == "hadamard" else random_orthogonal(size, seed=own)


def _turned_stream(weights: Weights, graph: UnitGraph, name: str, kind: Kind | Tensor, seed: int) -> Weights:
    space = graph.space(name)
    if "layer_norm" not in space.flags:
        return _graph.rotate(weights, graph, name, _matrix(kind, space.size, seed, name))
    # Around the vector of ones a norm that takes the mean away sees the mean that it saw before.
    turn = kind if isinstance(kind, Tensor) else keeping_mean(_matrix(kind, space.size - 1, seed, name))
    ones = torch.ones(space.size, dtype=turn.dtype, device=turn.device)
    if turn.shape == (space.size, space.size) and not torch.allclose(turn @ ones, ones, atol=1e-5):
        raise Error(
            f"rotate: the norms of {name} take the mean away, so its turn must leave the vector of ones where it is; "
            "see keeping_mean"
        )
    flags = (space.flags - {"layer_norm"}) | {"rms_norm"}
    graph = replace(graph, spaces={**graph.spaces, name: replace(space, flags=flags)})
    return _graph.rotate(weights, graph, name, turn)


def _turned_heads(weights: Weights, graph: UnitGraph, find: Callable[[str, int], Tensor | None]) -> Weights:
    """Every linear space turned that can be, by the matrix that is found for it."""
    for name, space in graph.spaces.items():
        uses = [member.use for member in graph.members(name)]
        if space.flags or space.size < 2 or not any(use.reads for use in uses) or not any(use.writes for use in uses):
            continue
        turn = find(name, space.size)
        if turn is None:
            continue
        try:
            weights = _graph.rotate(weights, graph, name, turn)
        except Error:  # heads themselves, each of which has scores of its own
            continue
    return weights


def _even(moment: Tensor | None) -> Tensor | None:
    """What evens out a moment, or None where there is none or no Hadamard matrix of its width."""
    return None if moment is None or not has_hadamard(len(moment)) else karhunen_loeve(moment)


def _moment(
    weights: Weights, graph: UnitGraph, space: str, stats: Mapping[str, Tensor],
    gains: Mapping[str, Sequence[str]], offset: float,
) -> Tensor | None:  # fmt: skip
    """``[units, units]``: the sum over all that reads a space; what several read together counts once."""
    gain_of = {reader: gain for gain, readers in gains.items() for reader in readers}
    total: Tensor | None = None
    last: Tensor | None = None
    for member in graph.members(space):
        gram = stats.get(member.tensor)
        if gram is None or not member.use.reads or member.dim != 1 or gram.dim() != 2:
            continue
        if gram.shape[0] != graph.shape(member.tensor)[1]:
            continue
        if last is not None and last.shape == gram.shape and torch.equal(gram, last):
            continue
        last = gram
        if member.tensor in gain_of:
            gain = working(weights[gain_of[member.tensor]]).to(gram) + offset
            gram = torch.where((gain[:, None] * gain) == 0, 0.0, divided(gram, torch.where(gain == 0, 1.0, gain)))
        table = unit_positions(graph, member, space).to(gram.device)
        part = gram[table[:, :, None], table[:, None, :]].double().sum(0)
        total = part if total is None else total + part
    return total
