"""The noun: an ordered, immutable, lazy mapping from names to tensors.

Checkpoints, differences of checkpoints, masks, scales and statistics are all `Weights` under the
same names, so that methods compose without glue. Nothing is read until a tensor is asked for.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.weights._files import Bytes
from weightsmith.weights._lazy import (
    Cast,
    Entire,
    Held,
    Lazy,
    Moved,
    Output,
    Spec,
    Unit,
    apply,
    materialize,
    naming,
    sources,
)
from weightsmith.weights._lineage import Step
from weightsmith.weights._select import Pattern, PerTensor, matches, resolve, varies
from weightsmith.weights._spec import as_dtype, dtype_name

if TYPE_CHECKING:
    from weightsmith.weights._planned import Planned
    from weightsmith.weights._save import Saved

_PACKED = getattr(torch, "float4_e2m1fn_x2", None)


class Loaded(NamedTuple):
    """What `Weights.load_into` could not match (empty when strict)."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Weights(Mapping[str, Tensor]):
    """An ordered, immutable, lazy mapping ``name -> tensor``. Made by `weightsmith.open`.

    >>> w = Weights.of({"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)})
    >>> (2 * w + 1)["a"]
    tensor([3., 3.])
    >>> (w - w).spec("b").dtype           # known before anything is computed
    torch.bfloat16
    """

    def __init__(
        self,
        nodes: Mapping[str, Lazy],
        lineage: Step | None = None,
        files: Mapping[str, bytes | Bytes] | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        self._nodes = dict(nodes)
        self.lineage = lineage or Step("memory")
        """The tree of `Step` that made these weights; printable, and recorded in outputs."""
        self.files: Mapping[str, bytes | Bytes] = dict(files or {})
        """What travels beside the tensors (config, tokenizer, licence), by relative path."""
        self.metadata: Mapping[str, str] = dict(metadata or {})
        """Words that the file carried in its header."""

    @classmethod
    def of(cls, tensors: Mapping[str, Any], where: str = "the mapping") -> Weights:
        """Weights over tensors (or numpy arrays) in memory. They are referred to, not copied.

        Names with one storage, offset, shape and stride are tied.
        """
        nodes: dict[str, Lazy] = {}
        shared: dict[object, Lazy] = {}
        for name, value in tensors.items():
            if not isinstance(name, str):
                raise Error(f"{where}: names must be words, got {name!r}")
            tensor = value if isinstance(value, Tensor) else _from_array(name, value, where)
            key = _memory_key(tensor)
            try:
                nodes[name] = shared[key] if key in shared else shared.setdefault(key, Held(tensor))
            except Error as error:
                raise Error(f"{where}: {name!r} is {error}") from None
        return cls(nodes)

    # Looking

    def __getitem__(self, name: str) -> Tensor:
        node = self.node(name)
        with naming(name):
            return materialize(node)

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: object) -> bool:
        return name in self._nodes

    # Two mappings of tensors have no single truth value; identity is what a container can use.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def node(self, name: str) -> Lazy:
        """The node behind a name, for who builds methods."""
        try:
            return self._nodes[name]
        except KeyError:
            raise MissingTensor(f"no tensor {name!r}{did_you_mean(name, self._nodes)}") from None

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a tensor, without reading it."""
        return self.node(name).spec

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor, aliases included."""
        return {name: node.spec for name, node in self._nodes.items()}

    @property
    def ties(self) -> dict[str, str]:
        """Alias -> the first name of the same tensor. Tied tensors are computed and written once."""
        first: dict[int, str] = {}
        ties = {}
        for name, node in self._nodes.items():
            canonical = first.setdefault(id(node), name)
            if canonical != name:
                ties[name] = canonical
        return ties

    @property
    def numel(self) -> int:
        """Parameters, each tied tensor once."""
        return sum(node.spec.numel for node in self._distinct())

    @property
    def nbytes(self) -> int:
        """Bytes of all values, each tied tensor once."""
        return sum(node.spec.nbytes for node in self._distinct())

    def _distinct(self) -> Iterable[Lazy]:
        return {id(node): node for node in self._nodes.values()}.values()

    def names(self, pattern: Pattern = "*", floating: bool | None = None) -> list[str]:
        """The names that fit a pattern; ``floating=True`` keeps those with float values."""
        return [
            name
            for name, node in self._nodes.items()
            if matches(pattern, name) and (floating is None or node.spec.dtype.is_floating_point == floating)
        ]

    def __repr__(self) -> str:
        dtypes = sorted({dtype_name(node.spec.dtype) for node in self._nodes.values()})
        return f"<Weights: {len(self)} tensors, {self.numel:,} parameters, {self.nbytes:,} bytes, {', '.join(dtypes)}>"

    # Choosing

    def select(self, pattern: Pattern = "*", floating: bool | None = None) -> Weights:
        """Only the tensors that fit. An error if none does."""
        names = self.names(pattern, floating)
        if not names and self._nodes:
            raise Error(f"no tensor fits {pattern!r}; there are {listed(self._nodes)}")
        return self._derived({name: self._nodes[name] for name in names}, "select", {"pattern": _said(pattern)})

    def drop(self, pattern: Pattern) -> Weights:
        """All but the tensors that fit."""
        names = set(self.names(pattern))
        return self._derived(
            {name: node for name, node in self._nodes.items() if name not in names}, "drop", {"pattern": _said(pattern)}
        )

    def rename(self, to: Callable[[str], str] | Mapping[str, str]) -> Weights:
        """Other names: a function of the old name, or ``{old: new}`` for some of them."""
        if isinstance(to, Mapping):
            unknown = [name for name in to if name not in self._nodes]
            if unknown:
                raise Error(f"cannot rename {listed(unknown)}: no such tensor{did_you_mean(unknown[0], self._nodes)}")
            new = {name: to.get(name, name) for name in self._nodes}
        else:
            new = {name: to(name) for name in self._nodes}
        if len(set(new.values())) != len(new):
            seen: set[str] = set()
            twice = [name for name in new.values() if name in seen or seen.add(name)]
            raise Error(f"renaming gives two tensors the name {listed(twice)}")
        return self._derived({new[name]: node for name, node in self._nodes.items()}, "rename", {})

    def __or__(self, patch: Mapping[str, Any]) -> Weights:
        """These tensors with those of ``patch`` laid over them."""
        over = patch if isinstance(patch, Weights) else Weights.of(patch)
        return self._derived(self._nodes | over._nodes, "overlay", {}, over)

    # Computing

    def map(
        self,
        function: Callable[..., Tensor],
        *others: Weights,
        unit: Unit = "element",
        whole: Iterable[Weights] = (),
        spec: Spec | Callable[[str], Spec] | None = None,
        options: Mapping[str, PerTensor[Any]] | None = None,
    ) -> Weights:
        """``function(tensor, *other tensors, **options)`` for every name.

        Args:
            function: on flat chunks when ``unit`` is ``"element"``, on runs of rows or whole tensors
                else. Low precision arrives as float32 and is rounded once, when written.
            others: weights with the same names.
            unit: what must not be torn apart: ``"element"``, ``"row"`` or ``"tensor"``.
            whole: weights whose tensors are handed over entire, whatever the unit.
            spec: what comes out, where it cannot be found by trying on the meta device.
            options: keyword arguments, each possibly `PerTensor`.
        """
        chosen = {key: resolve(value, self, key) for key, value in (options or {}).items()}
        whole = tuple(whole)

        def build(name: str, *nodes: Lazy) -> Lazy:
            own = {key: values[name] for key, values in chosen.items()}
            promised = spec(name) if callable(spec) else spec
            entire = [Entire(other.node(name)) for other in whole]
            return apply(function, *nodes, *entire, unit=unit, spec=promised, options=own)

        name = getattr(function, "__name__", "function")
        return self.zip_nodes(build, others, name, dict(options or {}))

    def zip_nodes(
        self,
        build: Callable[..., Lazy],
        others: tuple[Weights, ...],
        method: str,
        options: Mapping[str, Any],
        apart: Callable[[str], object] | None = None,
    ) -> Weights:
        """Weights with one new node a name, for who builds methods; names tied in all stay tied.

        Args:
            build: ``(name, node, *nodes of the others) -> node``; its errors are given the name.
            others: weights with the same names.
            method, options: what the lineage says of this step.
            apart: what a name asks for beside its nodes. Tied names that ask for different things come apart.
        """
        for other in others:
            same_names(self, other, f"{method} needs the same tensors on both sides")
        made: dict[tuple[int, ...], list[tuple[object, Lazy]]] = {}
        nodes: dict[str, Lazy] = {}
        for name, own in self._nodes.items():
            members = (own, *(other._nodes[name] for other in others))
            wanted = None if apart is None else apart(name)
            alike = made.setdefault(tuple(id(member) for member in members), [])
            node = next((node for asked, node in alike if asked == wanted), None)
            if node is None:
                try:
                    node = build(name, *members)
                except Error as error:
                    raise type(error)(f"tensor {name}: {error}") from None
                alike.append((wanted, node))
            nodes[name] = node
        return self._derived(nodes, method, options, *others)

    def _binary(self, function: Callable[..., Tensor], other: Any, swapped: bool = False) -> Weights:
        if isinstance(other, Weights):
            left, right = (other, self) if swapped else (self, other)

            def build(name: str, a: Lazy, b: Lazy) -> Lazy:
                _check_bool(function, a.spec, b.spec)
                return apply(function, a, b)

            return left.zip_nodes(build, (right,), function.__name__, {})
        if isinstance(other, Mapping) and any(isinstance(value, Tensor) for value in other.values()):
            return self._binary(function, Weights.of(other), swapped)
        if not (isinstance(other, int | float) or varies(other)):
            return NotImplemented
        numbers = resolve(other, self, function.__name__)

        def scaled(name: str, node: Lazy) -> Lazy:
            pair = (numbers[name], node) if swapped else (node, numbers[name])
            return apply(function, *pair)

        return self.zip_nodes(scaled, (), function.__name__, {"number": other})

    def __add__(self, other: Any) -> Weights:
        return self._binary(operator.add, other)

    def __radd__(self, other: Any) -> Weights:
        return self._binary(operator.add, other, swapped=True)

    def __sub__(self, other: Any) -> Weights:
        return self._binary(operator.sub, other)

    def __rsub__(self, other: Any) -> Weights:
        return self._binary(operator.sub, other, swapped=True)

    def __mul__(self, other: Any) -> Weights:
        return self._binary(operator.mul, other)

    def __rmul__(self, other: Any) -> Weights:
        return self._binary(operator.mul, other, swapped=True)

    def __truediv__(self, other: Any) -> Weights:
        return self._binary(operator.truediv, other)

    def __rtruediv__(self, other: Any) -> Weights:
        return self._binary(operator.truediv, other, swapped=True)

    def __neg__(self) -> Weights:
        return self.zip_nodes(lambda name, node: apply(operator.neg, node), (), "neg", {})

    def cast(self, dtype: PerTensor[torch.dtype | str], floating: bool = True) -> Weights:
        """The same values in another dtype.

        Args:
            dtype: a dtype or its name, possibly by tensor.
            floating: leave tensors alone that hold no floats (counters, masks, codes).

        Raises:
            Error: on reading, where a finite value does not fit (float16 and float8 overflow).
        """
        chosen = {name: as_dtype(word) for name, word in resolve(dtype, self, "dtype").items()}

        def build(name: str, node: Lazy) -> Lazy:
            if floating and not node.spec.dtype.is_floating_point:
                return node
            same = node.spec.dtype == chosen[name]
            if not same and _PACKED in (node.spec.dtype, chosen[name]):
                raise Error("float4 packs two values in a byte, and torch cannot convert it")
            # What is computed is not rounded yet, even where its spec says so.
            return node if same and not isinstance(node, Output | Moved) else Cast(node, chosen[name])

        return self.zip_nodes(build, (), "cast", {"dtype": dtype})

    def to(self, device: torch.device | str) -> Weights:
        """The same values, delivered on a device."""
        place = torch.device(device)
        return self.zip_nodes(lambda name, node: Moved(node, place), (), "to", {"device": str(place)})

    # Leaving

    def to_dict(self) -> dict[str, Tensor]:
        """Every tensor in memory, a plain state dict; tied names share one tensor."""
        made: dict[int, Tensor] = {}
        for name, node in self._nodes.items():
            if id(node) not in made:
                made[id(node)] = self[name]
        return {name: made[id(node)] for name, node in self._nodes.items()}

    def load_into(self, module: nn.Module, strict: bool = True) -> Loaded:
        """Copy the values into a module's parameters and buffers, one tensor at a time.

        Nothing is copied unless every shape fits. Values take the module's dtypes and devices;
        parameters on the meta device take those of the weights.

        Args:
            module: its state dict's names are matched.
            strict: names on one side only are an error, but for buffers that the module makes by itself and keeps out
                of its state dict, as older checkpoints have them: these stay the module's.
        """
        own = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
        by_itself = {name for name, _ in module.named_buffers(remove_duplicate=False)} - own.keys()
        covered = {_memory_key(own[name]) for name in own if name in self}
        missing = [n for n in own if n not in self and _memory_key(own[n]) not in covered]
        unexpected = [name for name in self if name not in own and name not in by_itself]
        if strict and (missing or unexpected):
            parts = [f"it needs {listed(missing)}"] * bool(missing) + [f"it has no {listed(unexpected)}"] * bool(
                unexpected
            )
            hint = did_you_mean(missing[0], unexpected) if missing else did_you_mean(unexpected[0], own)
            raise Error(f"these weights do not fit the module: {'; '.join(parts)}{hint}; or pass strict=False")
        wrong = [f"{n} {list(self.spec(n).shape)} into {list(own[n].shape)}"
                 for n in own if n in self and self.spec(n).shape != tuple(own[n].shape)]  # fmt: skip
        if wrong:
            raise Error(f"shapes do not fit the module: {listed(wrong)}")
        values: Mapping[str, Tensor] = self
        if any(tensor.is_meta for tensor in own.values()):
            module.load_state_dict(self.to_dict(), strict=False, assign=True)
            _tie_again(module, own)
            return Loaded(missing, unexpected)
        if _reads_elsewhere(self, own):
            values = {name: value.clone() for name, value in self.to_dict().items()}
        with torch.no_grad():
            for name, tensor in own.items():
                if name in self:
                    tensor.copy_(values[name])
        return Loaded(missing, unexpected)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        max_shard_size: int | str | None = "5GB",
        overwrite: bool = False,
        resume: bool = False,
        threads: int | None = None,
        memory: int | str | None = None,
        executor: Literal["threads", "processes", "ray"] = "threads",
        workers: int | None = None,
    ) -> Saved:
        """Write the weights in one streaming pass, whole or not at all.

        Args:
            path: a file (``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.npz``), else a folder
                that gets ``model.safetensors`` (or shards and an index) and `files`.
            format: ``"safetensors"``, ``"pt"`` or ``"npz"``, where the path does not say.
            max_shard_size: bytes of a shard in a folder (``"5GB"``); None for a single file.
            overwrite: replace what is there. The old one stays until the new one is whole.
            resume: go on with an interrupted save of the same thing to the same place.
            threads: how many compute; default one a core.
            memory: bytes in flight at most (``"512MB"``), of all workers together; default 256 MB each.
            executor: who computes; the bytes are the same. ``"processes"`` of this machine suit functions that
                hold Python's lock; ``"ray"`` uses the cluster that is there, whose machines must share the file
                system, or starts one here. Both need functions that other processes can import (with cloudpickle
                installed, any).
            workers: how many processes or actors; default one a core. Each has one thread.

        Raises:
            OutputError: the place is taken, is an input, is being written by another process, or
                has too little room; or worker processes died again and again.
            Error: a tensor that other processes cannot compute.
            MissingPackage: ray is not installed.
        """
        from weightsmith.weights._save import save

        return save(
            self,
            path,
            format=format,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            resume=resume,
            threads=threads,
            memory=memory,
            executor=executor,
            workers=workers,
        )

    def planned(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        max_shard_size: int | str | None = "5GB",
        overwrite: bool = False,
        threads: int | None = None,
        memory: int | str | None = None,
    ) -> Planned:
        """What `save` with the same arguments would do; nothing is written, and only headers are read.

        Raises:
            Error: what a save would refuse before it writes anything, such as a place that is taken.

        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan = Weights.of({"a": torch.ones(1000)}).planned(os.path.join(folder, "a.safetensors"))
        >>> plan.files, plan.passes, plan.writes > 4000
        (('a.safetensors',), 1, True)
        """
        from weightsmith.weights._planned import planned

        return planned(self, path, format, max_shard_size, overwrite, threads, memory)

    # Making others

    def with_files(self, files: Mapping[str, bytes | Bytes]) -> Weights:
        """The same tensors with other files beside them (added to, or replacing, those there)."""
        return Weights(self._nodes, self.lineage, {**self.files, **files}, self.metadata)

    def _derived(self, nodes: Mapping[str, Lazy], method: str, options: Mapping[str, Any], *others: Weights) -> Weights:
        step = Step(method, options, (self.lineage, *(other.lineage for other in others)))
        return Weights(nodes, step, self.files, self.metadata)


class MissingTensor(Error, KeyError):
    """A name that is not there."""

    __str__ = Error.__str__


def same_names(first: Mapping[str, Any], other: Mapping[str, Any], why: str) -> None:
    """An error that lists what one of two mappings lacks."""
    lacking = [name for name in first if name not in other]
    extra = [name for name in other if name not in first]
    if lacking or extra:
        parts = [f"the second lacks {listed(lacking)}"] * bool(lacking)
        parts += [f"the first lacks {listed(extra)}"] * bool(extra)
        raise Error(f"{why}: {'; '.join(parts)}; choose with .select(...) or .drop(...)")


def _check_bool(function: Callable[..., Any], *specs: Spec) -> None:
    if function is operator.sub and all(spec.dtype == torch.bool for spec in specs):
        raise Error("booleans cannot be subtracted; leave them out with .select(floating=True)")


def _from_array(name: str, value: Any, where: str) -> Tensor:
    if hasattr(value, "__array_interface__"):
        import numpy

        array = numpy.asarray(value)
        if not (array.flags.writeable and array.dtype.isnative) or any(step < 0 for step in array.strides):
            array = array.astype(array.dtype.newbyteorder("="), order="C")  # torch takes no others as they are
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise Error(f"{where}: {name!r} is an array of {array.dtype}, which torch cannot take: {error}") from None
    raise Error(f"{where}: {name!r} is a {type(value).__name__}, not a tensor")


def _memory_key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for names of one tensor."""
    if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "full_tensor") or tensor.layout != torch.strided:
        return ("object", id(tensor))
    try:
        flipped = (tensor.is_conj(), tensor.is_neg())
        return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, flipped)
    except RuntimeError:  # a wrapper subclass without memory of its own
        return ("object", id(tensor))


def _tie_again(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """What was one parameter under several names is one again, after each name was assigned on its own."""
    first: dict[int, Tensor] = {}
    after = module.state_dict(keep_vars=True)
    for name, tensor in before.items():
        if not after[name].is_meta:
            first.setdefault(id(tensor), after[name])
    for name, tensor in before.items():
        one = first.get(id(tensor))
        if one is not None and after[name] is not one:
            place, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(place), leaf, one)


def _reads_elsewhere(weights: Weights, own: Mapping[str, Tensor]) -> bool:
    """Whether a value rests on a tensor that would be overwritten under another name before it is read."""
    places = {_memory_key(tensor)[1:2]: name for name, tensor in own.items() if not tensor.is_meta}
    for name in weights:
        for node in sources(weights.node(name)):
            if isinstance(node, Held) and places.get(_memory_key(node.tensor)[1:2], name) != name:
                return True
    return False


def _said(pattern: Pattern) -> Any:
    return getattr(pattern, "__name__", "test") if callable(pattern) else pattern
