"""What goes into the blocks of a model: recorded once at the first one, handed from each to the next, kept on disk.

The model itself says how its blocks are called: it is run with blocks that only note their arguments and pass the
hidden state on. That nothing happens to the hidden state between two blocks is not assumed but seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, told
from weightsmith.stats.room import Batch, Forward, mapped
from weightsmith.weights import Weights, open

HIDDEN = {"hidden": True}
"""What stands for the hidden state among recorded arguments."""


# Arguments


@dataclass
class Arguments:
    """How blocks are called, as JSON-able trees whose tensors lie in a table, equal ones once."""

    device: torch.device
    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: list[Any] = field(default_factory=list)
    """What is no data; it cannot be written down."""
    _seen: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def noted(self, value: Any, hidden: Tensor) -> Any:
        """A tree for some arguments."""
        if value is hidden:
            return HIDDEN
        if isinstance(value, Tensor):
            return {"tensor": self._key(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return {"is": value}
        if type(value) in (tuple, list):
            return {type(value).__name__: [self.noted(one, hidden) for one in value]}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.noted(one, hidden) for key, one in value.items()}}
        if not any(value is one for one in self.objects):
            self.objects.append(value)
        return {"object": next(index for index, one in enumerate(self.objects) if one is value)}

    def called(self, tree: Any, hidden: Tensor) -> Any:
        """The arguments again, with another hidden state."""
        ((kind, value),) = tree.items()
        if kind == "hidden":
            return hidden
        if kind == "tensor":
            return self.tensors[value]
        if kind == "dict":
            return {key: self.called(one, hidden) for key, one in value.items()}
        if kind in ("tuple", "list"):
            return (tuple if kind == "tuple" else list)(self.called(one, hidden) for one in value)
        return self.objects[value] if kind == "object" else value

    def _key(self, value: Tensor) -> str:
        if value.is_meta:
            raise OnMeta
        known = self._seen.get(id(value))
        if known is not None:
            return known[1]
        key = digest(value)
        self.tensors.setdefault(key, value.detach().to(self.device, copy=True))
        self._seen[id(value)] = (value, key)  # kept alive, so that its id stays its own
        return key

    def forget(self) -> None:
        """The next batch has tensors of its own."""
        self._seen.clear()


def digest(value: Tensor) -> str:
    """A word for the contents of a tensor."""
    plain = value.detach().to("cpu").contiguous()
    total = hashlib.sha256(f"{plain.dtype}{list(plain.shape)}".encode())
    if plain.numel():
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


class OnMeta(Exception):
    """A tensor without values among the arguments."""


# Recording


class _Enough(BaseException):
    """The last block was reached."""


class _NotPassed(Exception):
    """The hidden state did not come from one block to the next as it was."""


@dataclass
class _Catcher:
    """Stands in for all blocks during one run of the model."""

    names: Sequence[str]
    arguments: Arguments
    wrapped: bool
    calls: list[Any] = field(default_factory=list)
    first: Tensor | None = None
    passed: Tensor | None = None

    def catch(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(self.calls):
            there = "comes again" if index < len(self.calls) else f"comes before {self.names[len(self.calls)]}"
            raise _NotPassed(f"{self.names[index]} {there}; each block runs once, in the order of blocks=")
        given = [*args, *kwargs.values()]
        if self.passed is None:
            self.first = self.passed = next((one for one in given if isinstance(one, Tensor)), None)
            if self.passed is None:
                raise Error(f"{self.names[0]} is called without any tensor, so it has no input that could be recorded")
            if self.passed.is_meta:
                raise OnMeta
        elif sum(one is self.passed for one in given) != 1:
            raise _NotPassed(f"what {self.names[index - 1]} gives is not what {self.names[index]} is given")
        tree = {"args": args, "kwargs": kwargs}
        self.calls.append(self.arguments.noted(tree, self.passed))
        if len(self.calls) == len(self.names):
            raise _Enough
        return (self.passed,) if self.wrapped else self.passed


@dataclass
class CallRecorder:
    """Runs a model up to its last block and notes how each block is called."""

    model: nn.Module
    names: Sequence[str]
    arguments: Arguments
    forward: Forward
    wrapped: bool | None = None
    """Whether blocks give a tuple; found out at the first batch."""

    def record(self, batch: Batch, everything: Callable[[], bool]) -> tuple[Tensor, list[Any]]:
        """The hidden state before the first block, and the call of every block."""
        try:
            return self._either(batch)
        except Error:
            raise
        except Exception:  # whatever a module raises that reads a weight of one inside that is not called
            if not everything():
                raise
        try:
            return self._either(batch)
        except OnMeta:
            raise Error(
                f"{self.names[0]} is given a tensor without values; are there some on the meta device?"
            ) from None

    def _either(self, batch: Batch) -> tuple[Tensor, list[Any]]:
        ways = [False, True] if self.wrapped is None else [self.wrapped]
        problems: list[Exception] = []
        for wrapped in ways:
            try:
                found = self._run(batch, wrapped)
            except (Error, OnMeta):
                raise
            except Exception as error:  # a model that expects the other form may raise anything
                problems.append(error)
                continue
            if len(self.names) > 1:
                self.wrapped = wrapped
            return found
        between = next((problem for problem in problems if isinstance(problem, _NotPassed)), None)
        if between is None:
            raise problems[0]
        raise Error(
            f"the blocks do not follow one another directly: {between}. Name with blocks= modules that do, or the "
            "larger ones that hold them"
        )

    def _run(self, batch: Batch, wrapped: bool) -> tuple[Tensor, list[Any]]:
        catcher = _Catcher(self.names, self.arguments, wrapped)
        blocks = [self.model.get_submodule(name) for name in self.names]
        self.arguments.forget()
        try:
            with _caught(blocks, catcher), torch.no_grad():
                self.forward(self.model, batch)
        except _Enough:
            assert catcher.first is not None
            return catcher.first.detach(), catcher.calls
        reached = len(catcher.calls)
        raise Error(f"the model was run, but its block {self.names[reached]} was not: it is not part of every pass")


@contextmanager
def _caught(blocks: Sequence[nn.Module], catcher: _Catcher) -> Iterator[None]:
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):

            def forward(*args: Any, _index: int = index, **kwargs: Any) -> Any:
                return catcher.catch(_index, args, kwargs)

            block.__dict__["forward"] = forward
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch where they are needed."""
    return mapped(lambda value: value.to(device), batch)


def first_of(output: Any, name: str) -> Tensor:
    """The hidden state among what a block gives: itself, or the first of several."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise Error(
            f"{name} gives a {type(output).__name__}; walk needs blocks that give a tensor, or one first of all"
        )
    return output


# Hidden states, in memory or in a file


class InMemory:
    """One tensor a batch."""

    def __init__(self) -> None:
        self._values: list[Tensor | None] = []

    def append(self, value: Tensor) -> None:
        self._values.append(value.detach().to("cpu"))

    def __getitem__(self, index: int) -> Tensor:
        value = self._values[index]
        assert value is not None
        return value

    def drop(self, index: int) -> None:
        """It is not asked for again."""
        self._values[index] = None

    def close(self) -> None:
        """All are there."""

    def remove(self) -> None:
        """None is asked for again."""
        self._values.clear()


class InFile:
    """The same in a file, of which memory holds what is just read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self._end = 0
        self._writing: Any = path.open("wb")

    def append(self, value: Tensor) -> None:
        plain = value.detach().to("cpu").contiguous()
        self._index.append((self._end, tuple(plain.shape), plain.dtype))
        if plain.numel():
            self._writing.write(plain.reshape(-1).view(torch.uint8).numpy().data)
        self._end += plain.numel() * plain.element_size()

    def __getitem__(self, index: int) -> Tensor:
        if not self._writing.closed:
            self._writing.flush()
        offset, shape, dtype = self._index[index]
        made = torch.empty(shape, dtype=dtype)
        if made.numel():
            view = made.view(-1).view(torch.uint8).numpy().data
            with self.path.open("rb") as file:
                file.seek(offset)
                if file.readinto(view) != len(view):
                    raise Error(f"{self.path}: ends too early; start again without resume=")
        return made

    def drop(self, index: int) -> None:
        """Nothing is held."""

    def close(self) -> None:
        self._writing.flush()
        os.fsync(self._writing.fileno())
        self._writing.close()

    def remove(self) -> None:
        if not self._writing.closed:
            self._writing.close()
        self.path.unlink(missing_ok=True)

    def described(self) -> list[Any]:
        return [[offset, list(shape), str(dtype).removeprefix("torch.")] for offset, shape, dtype in self._index]

    @classmethod
    def opened(cls, path: Path, index: Sequence[Any]) -> InFile:
        found = cls.__new__(cls)
        found.path = path
        found._index = [(offset, tuple(shape), getattr(torch, dtype)) for offset, shape, dtype in index]
        found._end = path.stat().st_size
        found._writing = path.open("rb")
        found._writing.close()
        return found


# A run that can be continued


class Run:
    """A folder with what a walk has made so far.

    ``run.json`` says of what walk; ``calls.json`` and ``calls.safetensors`` how blocks are called; ``state.json`` how
    many blocks are finished and which file has the next one's inputs; ``block-<number>.safetensors`` new tensors.
    """

    def __init__(self, folder: str | os.PathLike[str], mark: Mapping[str, Any], resume: bool):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        own, before = json.dumps(mark, sort_keys=True), self._read("run.json")
        if before is None and any(self.folder.iterdir()):
            raise Error(f"{self.folder}: holds something else; store= is an empty or a new folder")
        if before is not None and not resume:
            raise Error(f"{self.folder}: holds a walk already; continue it with resume=True, or remove the folder")
        if before is not None and json.dumps(before, sort_keys=True) != own:
            different = sorted(key for key in {*before, *mark} if before.get(key) != json.loads(own).get(key))
            raise Error(
                f"{self.folder}: holds another walk: {', '.join(different)} differ; give the same arguments, or "
                "another folder"
            )
        self._write("run.json", mark)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Error(f"{self.folder / name}: is damaged: {told(error)}; remove the folder and start again") from None

    def _write(self, name: str, content: Any) -> None:
        """Whole or not at all."""
        draft = self.folder / f"{name}.new"
        with draft.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.folder / name)

    def hidden(self, index: int) -> InFile:
        """A new file for the inputs of a block."""
        return InFile(self.folder / f"inputs-{index:05d}.bin")

    def keep_calls(self, arguments: Arguments, calls: Sequence[Any], masks: Sequence[Tensor | None]) -> None:
        """How blocks are called, and which tokens count."""
        if arguments.objects:
            raise Error(
                f"blocks are called with a {type(arguments.objects[0]).__name__}, which cannot be written down; "
                "leave store= away"
            )
        noted = [None if mask is None else arguments.noted(mask, torch.empty(0)) for mask in masks]
        if arguments.tensors:
            Weights.of(arguments.tensors).save(self.folder / "calls.safetensors", overwrite=True)
        self._write("calls.json", {"calls": calls, "masks": noted})

    def calls(self, arguments: Arguments) -> tuple[list[Any], list[Tensor | None]]:
        """The same again."""
        found = self._read("calls.json")
        path = self.folder / "calls.safetensors"
        if path.exists():
            arguments.tensors.update({k: v.to(arguments.device) for k, v in open(path).to_dict().items()})
        masks = [None if tree is None else arguments.called(tree, torch.empty(0)) for tree in found["masks"]]
        return found["calls"], masks

    def reached(self) -> tuple[int, InFile | None]:
        """The finished blocks, and the inputs of the next one (None at the end, or at the start)."""
        state = self._read("state.json")
        if state is None:
            return 0, None
        path = self.folder / f"inputs-{state['done']:05d}.bin"
        return state["done"], InFile.opened(path, state["inputs"]) if state["inputs"] is not None else None

    def finished(self, done: int, inputs: InFile | None) -> None:
        """So many blocks are finished; the next one's inputs are there."""
        self._write("state.json", {"done": done, "inputs": None if inputs is None else inputs.described()})
        keep = None if inputs is None else inputs.path
        for path in self.folder.glob("inputs-*.bin"):
            if path != keep:
                path.unlink()

    def keep(self, index: int, new: Mapping[str, Tensor]) -> None:
        """The new tensors of a block."""
        path = self._shard(index)
        path.unlink(missing_ok=True)
        if new:
            Weights.of(new).save(path, overwrite=True)

    def _shard(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def kept(self, count: int) -> dict[str, Any]:
        """Every new tensor, as nodes that read when they are asked."""
        found: dict[str, Any] = {}
        for index in range(count):
            if self._shard(index).exists():
                shard = open(self._shard(index))
                found |= {name: shard.node(name) for name in shard}
        return found
