"""Statistics of data that lie with several processes: each looks at its own, and all get the numbers of the whole.

What is sent is the statistic, not the data, run by run, so that no process needs room for more than its own and the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as processes

from weightsmith import errors
from weightsmith.errors import Error
from weightsmith.stats.room import Said, alike, entered, left, part_of, rule_of, said_of, summed, told
from weightsmith.weights import Spec, Step, Weights

RUN = 2**22
"""Values that are sent together, float64."""

Found = Weights | Mapping[str, Weights]


def reduced(found: Found | None, group: Any = None) -> Any:
    """One statistic of the data of several processes: what a single process would have found in all of them.

    The counterpart of `combine` for `torch.distributed`. Every process of the group calls it, with what it found in its
    share of the data: ``found = stats.reduced(stats.collect(model, own_batches, ...))``. A process whose share may be
    empty asks `collect` with ``group=`` instead, or gives None here.

    Args:
        found: a statistic, or the dictionary of several that `collect` gives; None from a process without data.
        group: the process group; default, as ``"world"``: all processes.

    Returns:
        Weights, or a dictionary of them, as it was given: combined in float64, the same bits in every process, in
        memory, with the examples and rows of all. Layers that some processes never called are combined of the others.

    Raises:
        ValueError: in every process alike: different statistics, kinds, names or shapes, or no data in any.
    """
    given: dict[str, Weights] | None
    given = {"": found} if isinstance(found, Weights) else None if found is None else dict(found)
    result = _reduced(lambda: given, _group(group))
    return result[""] if list(result) == [""] else result


def together(gather: Callable[[], dict[str, Weights]], group: Any) -> dict[str, Weights]:
    """What all processes gather, together; an error in one of them is an error in all, and none waits for ever."""
    return _reduced(gather, _group(group))


def _group(group: Any) -> Any:
    if not processes.is_available() or not processes.is_initialized():
        raise Error("statistics of several processes need torch.distributed.init_process_group first")
    everyone = group is None or (isinstance(group, str) and group == "world")
    return processes.group.WORLD if everyone else group


def _reduced(gather: Callable[[], dict[str, Weights] | None], group: Any) -> dict[str, Weights]:
    headers: list[Any] = [None] * processes.get_world_size(group)
    found, problem = None, None
    try:
        found = gather()
        mine = None if found is None else _header(found)
    except Exception as error:
        mine, problem = errors.told(error), error
    processes.all_gather_object(headers, mine, group=group)
    if problem is not None:
        raise problem
    failed = [f"process {rank}: {header}" for rank, header in enumerate(headers) if isinstance(header, str)]
    if failed:
        raise Error(f"statistics of several processes: {failed[0]}")
    full = [header for header in headers if header is not None]
    if not full:
        raise Error("statistics need at least one batch of data in one of the processes, got none")
    if any(list(header) != list(full[0]) for header in full):
        raise Error(f"processes gathered different statistics: {[list(header) for header in full]}")
    return {key: _one(key, (found or {}).get(key), [h and h[key] for h in headers], group) for key in full[0]}


def _header(found: Mapping[str, Weights]) -> dict[str, tuple[Said, dict[str, tuple[Spec, str]]]]:
    """What each statistic says of itself, and name -> its spec and the first name of its tensor."""
    return {
        key: (said_of(one), {name: (one.spec(name), one.ties.get(name, name)) for name in one})
        for key, one in found.items()
    }


def _one(key: str, found: Weights | None, headers: Sequence[Any], group: Any) -> Weights:
    what = f"reduced: {key}" if key else "reduced"
    full = [header for header in headers if header is not None]
    alike([said for said, _ in full], [names for _, names in full], what)
    total = summed([said for said, _ in full])
    if not total.examples:
        raise Error("statistics need at least one batch of data in one of the processes, got none")
    made: dict[object, Tensor] = {}
    values: dict[str, Tensor] = {}
    own = processes.get_rank(group)
    for name in dict.fromkeys(name for _, names in full for name in names):
        there = [header[1].get(name) if header else None for header in headers]
        specs = list(dict.fromkeys(entry[0] for entry in there if entry))
        if len(specs) > 1:
            raise Error(f"{what}: {name} is {' in one process and '.join(map(str, specs))} in another")
        # Of every process, so that what is lacking in one is an error in all.
        parts = [part_of(header[0], total, name) if header and name in header[1] else 0.0 for header in headers]
        tied = tuple(entry and entry[1] for entry in there)  # one tensor where it is one in every process
        if tied not in made:
            value = found[name] if found is not None and name in found else None
            made[tied] = _sum(value, parts[own], specs[0], total, group)
        values[name] = made[tied]
    plain = Weights.of(values)
    step = Step("stats.reduced", {"processes": len(headers)}, () if found is None else (found.lineage,))
    return told({name: plain.node(name) for name in plain}, step, total)


def _sum(value: Tensor | None, part: float, spec: Spec, total: Said, group: Any) -> Tensor:
    """Summed (or the largest taken) in the first process of the group and told to all, so that all have one result."""
    rule = rule_of(total.kind)
    place = _device(group)
    device = place if value is None else value.device
    made = torch.empty(spec.numel, dtype=spec.dtype, device=device)
    flat = None if value is None else value.reshape(-1)
    operation = processes.ReduceOp.MAX if rule == "maximum" else processes.ReduceOp.SUM
    first = processes.get_global_rank(group, 0)
    for start in range(0, spec.numel, RUN):
        stop = min(start + RUN, spec.numel)
        if flat is None:
            run = torch.zeros(stop - start, dtype=torch.float64, device=place)
        else:
            run = entered(flat[start:stop].to(place), rule, part).contiguous()
        processes.reduce(run, first, op=operation, group=group)
        run = left(run, rule).to(spec.dtype)
        processes.broadcast(run, first, group=group)
        made[start:stop] = run.to(device)
    return made.reshape(spec.shape)


def _device(group: Any) -> torch.device:
    """Where the group's tensors must lie: in main memory where it can send that."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and processes.get_backend(group) in ("nccl", "xccl"):
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")
