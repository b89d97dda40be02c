"""What a save would do, without doing it: bytes to read and write, passes, memory, room."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weightsmith.weights import _save
from weightsmith.weights._execute import as_bytes, reduction_cost
from weightsmith.weights._files import is_remote
from weightsmith.weights._lazy import Lazy, Reduction, all_nodes, reductions_of, single
from weightsmith.weights._staging import bytes_on_disk, staging_folder
from weightsmith.weights._weights import Weights


@dataclass(frozen=True)
class Planned:
    """What `Weights.save` would do."""

    reads: int
    """Bytes of files, each once for every pass that reads it. What is in memory already does not count."""
    writes: int
    """Bytes of all files that would be written."""
    passes: int
    """How often the data of that tensor are read that needs it most, the writing included."""
    passes_at_least: bool
    """Whether a method decides on the way how often it reads; then ``reads`` and ``passes`` count it once."""
    memory: int
    """Bytes in flight at most, beside the program itself."""
    tensors: int
    files: tuple[str, ...]
    free: int
    """Bytes the disk has."""


def planned(
    weights: Weights,
    path: str | os.PathLike[str],
    format: str | None,
    max_shard_size: int | str | None,
    overwrite: bool,
    threads: int | None,
    memory: int | str | None,
) -> Planned:
    """See `Weights.planned`."""
    threads = _save.checked_threads(threads)
    budget = as_bytes(memory) or _save.MEMORY_EACH * threads
    place = os.fspath(path)
    if is_remote(place):  # it is made here first, then sent
        from weightsmith.weights import _remote

        name = _remote.shown(place).rstrip("/").rsplit("/", 1)[-1] or "weights"
        plan = _save.planned(weights, os.path.join(tempfile.gettempdir(), name), format, max_shard_size)
        _save.refuse_remote_inputs(weights, place)
        _remote.check(place, plan.is_folder, overwrite)
        folder = Path(tempfile.gettempdir())
    else:
        plan = _save.planned(weights, place, format, max_shard_size)
        _save.check_target(plan, overwrite)
        folder = _save.existing_parent(plan.target)
    found = _reductions(plan)
    costs = [group.cost for group in plan.groups] + [reduction_cost(one) for one in found]
    largest = max(costs)
    passes = max(1 + sum(not one.done for one in _under(group.nodes)) for group in plan.groups)
    return Planned(
        reads=_bytes(node for group in plan.groups for node in group.nodes) + sum(map(_read_by, found)),
        writes=_save.total_size(plan),
        passes=passes,
        passes_at_least=any(not _one_pass(reduction) for reduction in found),
        memory=min(threads * largest, max(budget, largest)),
        tensors=len(plan.layout.places),
        files=_save.file_names(plan),
        free=shutil.disk_usage(folder).free + bytes_on_disk(staging_folder(plan.target)),
    )


def _reductions(plan: _save.Plan) -> list[Reduction]:
    """Those that are still to be solved."""
    return [one for one in _under(node for group in plan.groups for node in group.nodes) if not one.done]


def _under(nodes: Iterable[Lazy]) -> list[Reduction]:
    return list({id(one): one for node in nodes for one in reductions_of(node)}.values())


def _read_by(reduction: Reduction) -> int:
    return _bytes(node for item in reduction.items for node in all_nodes(item))


def _one_pass(reduction: Reduction) -> bool:
    solver = reduction.solver
    return isinstance(solver, functools.partial) and solver.func is single


def _bytes(nodes: Iterable[Lazy]) -> int:
    """Bytes of files that are read to compute these nodes, once their reductions are solved."""
    found: dict[object, int] = {}
    stack, seen = list(nodes), set[int]()
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        inner = list(node.inputs())
        stack += inner
        file = getattr(node, "file", None)
        if not inner and file is not None:
            found[file.name, getattr(node, "offset", 0), str(node.spec)] = _stored(node)
    return sum(found.values())


def _stored(node: Lazy) -> int:
    """Bytes that a node takes in its file, which may be packed."""
    kind, member = getattr(node, "kind", None), getattr(node, "member", None)
    if kind is not None:  # blocks of a GGUF file
        return -(-node.spec.numel // kind.block) * kind.nbytes
    return node.spec.nbytes if member is None else member.packed
