"""Writing weights: plan first, bytes later, whole or not at all.

Specs are known before data, so the files are laid out first and every tensor is computed in
pieces straight to its place, by several threads, with no copy of anything whole. The bytes depend
neither on the number of threads nor on the size of the pieces.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith import progress
from weightsmith._version import __version__
from weightsmith.errors import Error, OutputError, did_you_mean
from weightsmith.weights import _gguf_write, _lineage, _safetensors
from weightsmith.weights._execute import Call, Job, as_bytes, default_threads, run, solving, working_set
from weightsmith.weights._files import Bytes, LocalFile, content_of, is_remote, read_bytes
from weightsmith.weights._layout import Layout
from weightsmith.weights._lazy import CHUNK, UNIT, Lazy, Output, Reduction, Scratch, as_buffer, convert, naming
from weightsmith.weights._open import NOT_MODELS, SUFFIXES, input_files
from weightsmith.weights._spec import dtype_name
from weightsmith.weights._staging import (
    Done,
    Journal,
    Staging,
    WorkersLost,
    bytes_on_disk,
    claimed,
    is_empty_folder,
    publish,
    staging_folder,
)
from weightsmith.weights._weights import Weights

if TYPE_CHECKING:
    from weightsmith.weights._crew import Crew

WRITABLE = {"safetensors": "model.safetensors", "pt": "pytorch_model.bin", "npz": "model.npz", "gguf": "model.gguf"}
"""Formats that can be written, and what the file is called in a folder."""

ADAPTERS = {"safetensors": "adapter_model.safetensors", "pt": "adapter_model.bin"}
"""What the file is called beside an adapter_config.json: the names by which PEFT finds it."""

MEMORY_EACH = 256_000_000
"""Bytes in flight for each thread, unless ``memory`` says otherwise."""

_COPY_BUFFER = 2**20
_PLAIN = 2


@dataclass(frozen=True)
class Saved:
    """What was written."""

    path: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    resumed: int
    """Units of work found finished."""


@dataclass(frozen=True)
class Plan:
    """Everything about a save that is settled before the first byte."""

    weights: Weights
    target: Path
    is_folder: bool
    layout: Layout
    small: dict[str, bytes | Bytes]
    groups: list[Group]

    def identity(self) -> object:
        """What must be equal for an interrupted save to be continued."""
        nodes: dict[str, object] = {}
        for name in self.layout.places:
            with naming(name):
                nodes[name] = self.weights.node(name).identity()
        laid = [[file.name, file.size, [[o, data.hex()] for o, data in file.fixed]] for file in self.layout.files]
        return [__version__, str(self.target.absolute()), nodes, laid, UNIT]


@dataclass(frozen=True)
class Group:
    """Outputs that are computed together, and the units of work they are cut into.

    A unit is a range of positions; an output has ``per`` elements in each.
    """

    names: tuple[str, ...]
    nodes: tuple[Lazy, ...]
    per: tuple[int, ...]
    grain: int
    units: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(node.spec.nbytes for node in self.nodes)

    @property
    def times(self) -> int:
        """Chunks that are taken together: copies and casts have few operands, so more fits in the cache."""
        return 1 if isinstance(self.nodes[0], Output) else _PLAIN

    @property
    def cost(self) -> int:
        """About how many bytes are held while a unit is computed."""
        return self.times * sum(working_set(node) for node in self.nodes)

    def bytes_of(self, unit: int) -> int:
        """What one unit of work writes."""
        first, last = self.units[unit]
        each = sum(per * node.spec.dtype.itemsize for per, node in zip(self.per, self.nodes, strict=True))
        return each * (last - first)


def save(
    weights: Weights,
    path: str | os.PathLike[str],
    *,
    format: str | None,
    max_shard_size: int | str | None,
    overwrite: bool,
    resume: bool,
    threads: int | None,
    memory: int | str | None,
    executor: str = "threads",
    workers: int | None = None,
) -> Saved:
    """See `Weights.save`."""
    check_executor(executor, threads, workers)
    budget = as_bytes(memory)
    place = os.fspath(path)
    if is_remote(place):
        return _save_remote(weights, place, format, max_shard_size, overwrite, threads, budget, executor, workers)
    plan = planned(weights, place, format, max_shard_size)
    check_target(plan, overwrite)
    crew = None if executor == "threads" else _crew(plan, executor, workers)
    with claimed(plan.target) as staging:
        done = _begun(plan, staging, overwrite, resume)
        try:
            write(plan, staging.whole, staging, done, threads, budget, crew)
        except BaseException as error:
            # What can be continued stays for resume; what is wrong in itself leaves nothing behind.
            if not isinstance(error, KeyboardInterrupt | SystemExit | WorkersLost) and not _is_full(error):
                staging.discard()
            explained = _explained(error, plan.target, staging)
            if explained is error:
                raise
            raise explained from error
        made = staging.whole if plan.is_folder else staging.whole / plan.layout.files[0].name
        try:
            publish(staging, made, overwrite, belongs_to_checkpoint)
        except OSError as error:
            raise OutputError(f"{plan.target}: {error.strerror or error}; the new one is whole at {made}") from error
        staging.discard()
    return _saved(plan, place, len(done))


def _begun(plan: Plan, staging: Staging, overwrite: bool, resume: bool) -> set[Done]:
    try:
        check_target(plan, overwrite)  # another process may have finished while we waited for the lock
        return staging.begin(plan.identity(), resume, {file.name: file.size for file in plan.layout.files})
    except BaseException as error:
        if not staging.journal.exists():  # nothing that anybody could continue
            staging.discard()
        if isinstance(error, OSError):
            raise _explained(error, plan.target, staging) from error
        raise


def _saved(plan: Plan, place: str, resumed: int) -> Saved:
    size = sum(file.size for file in plan.layout.files)
    return Saved(place, file_names(plan), len(plan.layout.places), size, resumed)


def file_names(plan: Plan) -> tuple[str, ...]:
    """Every file that is written, those with tensors first."""
    return (*(file.name for file in plan.layout.files), *plan.layout.small, *plan.small)


def total_size(plan: Plan) -> int:
    """Bytes of every file that is written."""
    small = [*plan.layout.small.values(), *plan.small.values()]
    return sum(file.size for file in plan.layout.files) + sum(
        len(content) if isinstance(content, bytes) else content.size for content in small
    )


EXECUTORS = ("threads", "processes", "ray")
"""Who computes: threads of this process, other processes of this machine, actors of a Ray cluster."""


def check_executor(executor: str, threads: int | None, workers: int | None) -> None:
    """An error for a way to execute that there is not, or that lacks a package."""
    if executor not in EXECUTORS:
        raise Error(
            f"unknown executor {executor!r}{did_you_mean(str(executor), EXECUTORS)}; known: {', '.join(EXECUTORS)}"
        )
    checked_threads(threads)
    if workers is not None and workers < 1:
        raise Error(f"workers must be at least 1, got {workers}")
    if executor == "threads" and workers is not None:
        raise Error('workers= are for executor="processes" and "ray"; with threads, say threads=')
    if executor != "threads" and threads is not None:
        raise Error(f'threads= are for executor="threads"; with {executor}, say workers=: each has one thread')
    if executor == "ray":
        from weightsmith.weights import _ray

        _ray.check_installed()


def _crew(plan: Plan, executor: str, workers: int | None) -> Crew:
    """Workers that are yet to be hired; an error if something cannot be computed by them."""
    from weightsmith.weights._crew import Crew

    folder = staging_folder(plan.target)
    crew = Crew(executor, workers, [folder / "whole" / file.name for file in plan.layout.files], folder / "held")
    crew.check(plan.groups)
    return crew


def checked_threads(threads: int | None) -> int:
    """The number of workers, checked."""
    if threads is not None and threads < 1:
        raise Error(f"threads must be at least 1, got {threads}")
    return threads or default_threads()


# Planning


def planned(weights: Weights, place: str, format: str | None, max_shard_size: int | str | None = None) -> Plan:
    """Lay out the files for ``weights`` at ``place``. Reads only samples of the inputs, for the lineage."""
    target = Path(os.path.abspath(place))
    suffix = SUFFIXES.get(target.suffix)
    is_folder = suffix is None
    format = _format(format, suffix, target, _gguf_write.WORDS in weights.files)
    if place.endswith(os.sep) and not is_folder:
        raise Error(f"{place}: a folder cannot be called {target.suffix}; write {place.rstrip(os.sep)} for a file")
    if not weights:
        raise Error(f"{place}: there are no tensors to save")
    adapter = is_folder and format in ADAPTERS and is_adapter(weights)
    name = (ADAPTERS if adapter else WRITABLE)[format] if is_folder else target.name
    shard = as_bytes(max_shard_size, "max_shard_size") if is_folder and not adapter else None
    layout = laid_out(weights, format, name, shard)
    small = _companions(weights) if is_folder and format != "gguf" else {}
    _check_companions(place, small, layout)
    return Plan(weights, target, is_folder, layout, small, grouped(weights))


def is_adapter(weights: Weights) -> bool:
    """Whether weights are an adapter with its settings beside it, and so a PEFT folder once saved."""
    return "adapter_config.json" in weights.files and any(".lora_" in name for name in weights)


def _format(format: str | None, suffix: str | None, target: Path, gguf: bool = False) -> str:
    if gguf and "gguf" not in (format, suffix) and (format or suffix) is not None:
        raise Error(f"{target}: these weights are laid out for GGUF, and no other format can hold them")
    if not gguf and "gguf" in (format, suffix):
        raise Error(
            f'{target}: cannot write gguf of weights as they are: quantize.formats.pack(weights, "gguf") makes those '
            "that become one, with its names and keys"
        )
    if gguf and (format or suffix) is None:
        return "gguf"
    if format is not None and format not in WRITABLE:
        raise Error(f"cannot write the format {format!r}{did_you_mean(format, WRITABLE)}; known: {', '.join(WRITABLE)}")
    if suffix is not None and suffix not in WRITABLE:
        raise Error(f"{target}: cannot write {suffix}; known: {', '.join(WRITABLE)}")
    if format is not None and suffix is not None and format != suffix:
        raise Error(f"{target}: the name says {suffix}, format= says {format}")
    return format or suffix or "safetensors"


def laid_out(weights: Weights, format: str, name: str, shard: int | None) -> Layout:
    """The layout of a format for these weights."""
    ties = weights.ties
    specs = {n: spec for n, spec in weights.specs.items() if n not in ties}
    lineage = _lineage.written(weights.lineage)
    carried = {k: v for k, v in weights.metadata.items() if k not in weights and k != _lineage.KEY}
    if format == "safetensors":
        _safetensors.check_names(weights, name)
        # More bytes than one shard may have: the index carries the lineage, and its shards need not repeat it.
        several = shard is not None and len(specs) > 1 and sum(spec.nbytes for spec in specs.values()) > shard
        words = {"format": "pt"} | carried | ({} if several else lineage)
        return _safetensors.layout(specs, ties, words, name, shard, lineage)
    if format == "gguf":
        return _gguf_write.layout(specs, _gguf_write.words_of(weights.files) or {}, name)
    if format == "pt":
        from weightsmith.weights import _torchfile

        return _torchfile.layout(specs, ties, carried | lineage, name, list(weights))
    from weightsmith.weights import _npz

    return _npz.layout(specs, ties, carried | lineage, name, list(weights))


def _companions(weights: Weights) -> dict[str, bytes | Bytes]:
    """Files to carry, with the dtype in config.json following a cast."""
    small = {**_recovered(weights), **weights.files}
    config = small.get("config.json")
    if config is not None:
        small["config.json"] = _with_dtype(config, weights)
    return small


def _check_companions(place: str, small: Mapping[str, object], layout: Layout) -> None:
    made = {file.name for file in layout.files} | layout.small.keys()
    for name in small:
        if name in made:
            raise Error(f"{place}: a file beside the tensors is called {name!r}, as the tensors' own; rename it")
        if not name or os.path.isabs(name) or ".." in Path(name).parts:
            raise Error(f"{place}: a file beside the tensors is called {name!r}, which is outside the folder")


def _recovered(weights: Weights) -> dict[str, bytes]:
    """Config and tokenizer of weights that come from a GGUF file, which keeps them inside."""
    if "config.json" in weights.files:
        return {}
    for file in weights.lineage.all_files():
        if isinstance(file, LocalFile) and file.path.suffix == ".gguf":
            from weightsmith.weights import _gguf

            return _gguf.companions(file.path)
    return {}


def _with_dtype(config: bytes | Bytes, weights: Weights) -> bytes | Bytes:
    raw = content_of(config)
    dtypes = {weights.spec(name).dtype for name in weights.names(floating=True)}
    try:
        parsed = json.loads(raw)
        keys = [key for key in ("torch_dtype", "dtype") if isinstance(parsed.get(key), str)]
    except (ValueError, AttributeError, RecursionError):
        return config
    if len(dtypes) != 1 or not keys:
        return config
    word = dtype_name(dtypes.pop())
    if all(parsed[key] == word for key in keys):
        return config
    return (json.dumps(parsed | dict.fromkeys(keys, word), indent=2, ensure_ascii=False) + "\n").encode()


def grouped(weights: Weights) -> list[Group]:
    """Every distinct tensor, with outputs of one computation side by side; largest first."""
    ties = weights.ties
    together: dict[int, list[str]] = {}
    for name in weights:
        if name not in ties:
            node = weights.node(name)
            together.setdefault(id(node.work) if isinstance(node, Output) else id(node), []).append(name)
    groups = [_group(tuple(names), tuple(weights.node(n) for n in names)) for names in together.values()]
    return sorted(groups, key=lambda group: -group.nbytes)


def _group(names: tuple[str, ...], nodes: tuple[Lazy, ...]) -> Group:
    first = nodes[0]
    if isinstance(first, Output):
        cut = first.work.cut
        positions, grain = cut.positions, cut.grain
        units = tuple(cut.ranges(UNIT))
    else:
        positions, grain = first.spec.numel, first.grain
        step = max(UNIT // grain, 1) * grain
        units = tuple((start, min(start + step, positions)) for start in range(0, positions, step))
    per = tuple(node.spec.numel // positions if positions else 0 for node in nodes)
    return Group(names, nodes, per, grain, units)


# Checks before anything is written


def check_target(plan: Plan, overwrite: bool) -> None:
    """Refuse to write over an input, over something that is there, or where there is no room."""
    target = plan.target
    _refuse_inputs(plan)
    if os.path.lexists(target) and not (plan.is_folder and is_empty_folder(target)):
        if not overwrite:
            raise OutputError(f"{target} exists; choose another place, or overwrite=True (--overwrite) to replace it")
        if target.is_dir() != plan.is_folder:
            kind = "folder" if target.is_dir() else "file"
            raise OutputError(f"{target} is a {kind}, and would be replaced by the other kind; remove it first")
        if plan.is_folder and not any(belongs_to_checkpoint(entry.name) for entry in target.iterdir()):
            raise OutputError(f"{target} is a folder without weights in it; overwriting is for checkpoints only")
    parent = existing_parent(target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the folder {parent} cannot be written to")
    needed = sum(file.size for file in plan.layout.files)
    free = shutil.disk_usage(parent).free + bytes_on_disk(staging_folder(target))
    if needed > free:
        raise OutputError(f"{target}: needs {needed:,} bytes, the disk has {free:,} free")


def _refuse_inputs(plan: Plan) -> None:
    target = plan.target
    # Links are followed to the end (a linked input), and not at the end (a folder of links, as model caches are).
    ours = {target, target.resolve(), target.parent.resolve() / target.name}
    growing = staging_folder(target).resolve()
    for file in input_files(plan.weights):
        places = {file.path.resolve(), file.path.parent.resolve() / file.path.name}
        if ours & places or (target.is_file() and file.same_file(target.stat())):
            raise OutputError(f"{target} is an input of this save; inputs are never written to")
        folders = {folder for place in places for folder in place.parents}
        if plan.is_folder and ours & folders:
            raise OutputError(f"{target} holds an input of this save ({file.name}); choose another place")
        if growing in folders:
            raise OutputError(f"{growing} holds an input of this save ({file.name}); move it away first")


def existing_parent(target: Path) -> Path:
    """The innermost folder that is there already."""
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    return parent


def belongs_to_checkpoint(name: str) -> bool:
    """Whether a file of a folder is part of the checkpoint in it, and goes when that is replaced."""
    return name.endswith((*SUFFIXES, ".index.json")) and not NOT_MODELS.match(name)


# Writing


def write(
    plan: Plan,
    folder: Path,
    staging: Staging | None,
    done: set[tuple[int, int]],
    threads: int | None,
    memory: int | None,
    crew: Crew | None = None,
) -> None:
    """Every file of the plan into ``folder``."""
    for name, content in {**plan.small, **plan.layout.small}.items():
        _write_small(folder / name, content)
    descriptors: list[int] = []
    journal: Journal | None = None
    finished = False
    try:
        for file in plan.layout.files:
            descriptors.append(_prepared(folder / file.name, file.size, file.fixed))
        journal = Journal(staging.journal, descriptors) if staging else None
        with progress.task(f"saving {plan.target.name}", sum(g.nbytes for g in plan.groups), "bytes") as advance:
            jobs = _jobs(plan, descriptors, journal, done, advance, crew)
            if crew is None:
                threads = checked_threads(threads)
                run(jobs, threads, memory or MEMORY_EACH * threads)
            else:
                with crew.at_work() as count:
                    run(jobs, count, memory or MEMORY_EACH * count, crew.seat, crew.stop)
        finished = True
    finally:
        try:
            if journal:
                journal.close(note=not finished)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
    if plan.layout.finish is not None:
        plan.layout.finish(folder)


def _prepared(path: Path, size: int, fixed: Sequence[tuple[int, bytes]]) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, size)
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, size)  # a full disk is found now, not after hours
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        for offset, data in fixed:
            _pwrite(descriptor, memoryview(data), offset)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _jobs(
    plan: Plan,
    descriptors: Sequence[int],
    journal: Journal | None,
    done: set[tuple[int, int]],
    advance: Callable[[int], None],
    crew: Crew | None,
) -> Iterator[Job]:
    under_way: dict[int, Reduction] = {}

    def job(number: int, group: Group) -> Job:
        left = [unit for unit in range(len(group.units)) if (number, unit) not in done]
        advance(group.nbytes - sum(group.bytes_of(unit) for unit in left))
        if not left:
            return
        yield from solving(group.nodes, under_way, None if crew is None else crew.totals)
        places = [plan.layout.places[name] for name in group.names]
        if crew is not None:
            yield crew.writing(number, group, left, places, functools.partial(_wrote, number, group, journal, advance))
            return
        writers = [(descriptors[file], offset) for file, offset in places]
        yield [Call(_writing(number, group, unit, writers, journal, advance), group.cost) for unit in left]

    for number, group in enumerate(plan.groups):
        yield job(number, group)


def _writing(
    number: int,
    group: Group,
    unit: int,
    writers: Sequence[tuple[int, int]],
    journal: Journal | None,
    advance: Callable[[int], None],
) -> Callable[[Scratch], None]:
    def call(scratch: Scratch) -> None:
        write_unit(group, unit, writers, scratch)
        _wrote(number, group, journal, advance, unit)

    return call


def _wrote(number: int, group: Group, journal: Journal | None, advance: Callable[[int], None], unit: int) -> None:
    advance(group.bytes_of(unit))
    if journal:
        journal.add((number, unit))


def write_unit(group: Group, unit: int, writers: Sequence[tuple[int, int]], scratch: Scratch) -> None:
    """Compute one unit of work and put it in its place.

    Args:
        writers: descriptor and offset of each output.
    """
    first, last = group.units[unit]
    widest = max(*group.per, 1)
    step = max(group.times * CHUNK // widest // group.grain, 1) * group.grain
    scratch.next_unit()
    for start in range(first, last, step):
        scratch.next_chunk()
        stop = min(start + step, last)
        for name, node, per, (descriptor, offset) in zip(group.names, group.nodes, group.per, writers, strict=True):
            with naming(name):
                values = node.read(start * per, stop * per, scratch)
                values = convert(values, node.spec.dtype, scratch).to("cpu").contiguous()
            _pwrite(descriptor, as_buffer(values), offset + start * per * node.spec.dtype.itemsize)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _write_small(path: Path, content: bytes | Bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
            return
        for offset in range(0, content.size, _COPY_BUFFER):
            file.write(read_bytes(content, offset, min(_COPY_BUFFER, content.size - offset)))


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _explained(error: BaseException, target: Path, staging: Staging) -> BaseException:
    if _is_full(error):
        return OutputError(
            f"{target}: the disk is full; what is finished is in {staging.folder}: make room and save again with "
            "resume=True (--resume), or remove it"
        )
    if isinstance(error, OSError) and not isinstance(error, Error):
        return OutputError(f"{target}: {error.strerror or error}")
    return error


def _save_remote(
    weights: Weights,
    url: str,
    format: str | None,
    shard: int | str | None,
    overwrite: bool,
    threads: int | None,
    memory: int | None,
    executor: str,
    workers: int | None,
) -> Saved:
    """Make it whole here, then send it."""
    from weightsmith.weights import _remote

    shown = refuse_remote_inputs(weights, url)
    with tempfile.TemporaryDirectory(prefix="weightsmith-") as place:
        local = Path(place, shown.rstrip("/").rsplit("/", 1)[-1] or "weights")
        saved = save(weights, local, format=format, max_shard_size=shard, overwrite=False, resume=False,
                     threads=threads, memory=memory, executor=executor, workers=workers)  # fmt: skip
        _remote.upload(local, url, overwrite)
    return Saved(shown, saved.files, saved.tensors, saved.nbytes, 0)


def refuse_remote_inputs(weights: Weights, url: str) -> str:
    """The address as it may be shown; an error if it holds an input."""
    from weightsmith.weights import _remote

    shown = _remote.shown(url)
    for file in [*weights.lineage.all_files(), *weights.files.values()]:
        if isinstance(file, _remote.RemoteFile) and f"{file.name}/".startswith(f"{shown.rstrip('/')}/"):
            raise OutputError(f"{shown} holds an input of this save ({file.name}); inputs are never written to")
    return shown
