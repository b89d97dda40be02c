"""The module that is walked: made without its weights, cut into blocks, and given values for a while.

Values come and go by taking the place of a module's parameters, never by writing into them: a module that is larger
than memory lies on the meta device but for the part in use, and one that a user holds is afterwards what it was.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, did_you_mean, listed, missing, told
from weightsmith.weights import Copied, Weights, materialize
from weightsmith.weights._layers import layers_of

CONFIG = "config.json"

FUSED = (
    "Where transformers fuses or renames tensors while it loads (experts of some mixtures), load the model with it "
    "and walk that: walk(AutoModel.from_pretrained(...), ...)"
)


# Without weights


@contextmanager
def hollow() -> Iterator[None]:
    """Modules made inside have no values in their parameters (meta device); their buffers are made as usual.

    ``torch.device("meta")`` would take the values of buffers as well, and those that no checkpoint holds (the
    frequencies of rotary embeddings) would be lost. At most one parameter at a time has memory. Not for several
    threads at once.

    >>> with hollow():
    ...     net = torch.nn.BatchNorm1d(2)
    >>> net.weight.device.type, net.running_var
    ('meta', tensor([1., 1.]))
    """
    usual = nn.Module.register_parameter
    kind: Any = nn.Module
    known: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        usual(module, name, parameter)
        if parameter is None or parameter.is_meta:
            return
        there = known.get(id(parameter))
        if there is None or there[0]() is not parameter:  # else one parameter of several modules, which it stays
            there = (weakref.ref(parameter), nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
            known[id(parameter)] = there
        module._parameters[name] = there[1]

    kind.register_parameter = register
    try:
        yield
    finally:
        kind.register_parameter = usual


def described(weights: Weights, dtype: torch.dtype | None) -> nn.Module:
    """The module of transformers that the ``config.json`` beside weights describes, `hollow`."""
    from weightsmith.weights._files import content_of

    if CONFIG not in weights.files:
        raise Error(
            "walk runs a model, and beside these weights is no config.json to make it from; give model=, made under "
            "weightsmith.stats.hollow(), or walk the module itself"
        )
    try:
        import transformers
    except ImportError:
        raise missing("transformers", "hf", "making a model from its config.json") from None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG).write_bytes(content_of(weights.files[CONFIG]))
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever comes
            raise Error(f"transformers cannot use the config.json of these weights: {told(error)}") from error
    if getattr(config, "quantization_config", None):
        raise Error("walk takes float weights, and these are quantized; see weightsmith.quantize.dequantize")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or torch.float32)  # as transformers does where it loads in a dtype
        with hollow(), torch.random.fork_rng(devices=()):
            return _class_of(config)(config).eval()
    except Error:
        raise
    except Exception as error:
        raise Error(f"transformers cannot make the model of this config.json: {told(error)}") from error
    finally:
        torch.set_default_dtype(before)


def _class_of(config: Any) -> Any:
    """The class that the configuration names, else that which predicts tokens, else the bare model."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    named = next(iter(getattr(config, "architectures", None) or ()), "")
    kind: Any = getattr(transformers, named, None) if named else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    for table in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in table:
            kind = table[type(config)]
            return kind[0] if isinstance(kind, tuple) else kind
    raise Error(f"transformers has no model for {named or config.model_type}; give model=")


# Blocks


def blocks_of(model: nn.Module, weights: Weights, blocks: str | Sequence[str] | None) -> list[str]:
    """The names of the modules that are walked, in their order.

    Args:
        blocks: a list of names, or the name of the container whose children they are; None for the one container.
    """
    modules = dict(model.named_modules())
    if blocks is None:
        return _children(modules, _stack(model, weights))
    if isinstance(blocks, str):
        if blocks not in modules:
            raise Error(f"blocks={blocks!r}: the model has no such module{did_you_mean(blocks, modules)}")
        names = _children(modules, blocks)
    else:
        names = list(blocks)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise Error(f"blocks=: the model has no modules {listed(unknown)}{did_you_mean(listed(unknown), modules)}")
    nested = [(a, b) for a in names for b in names if b.startswith(f"{a}.")]
    if nested or len(set(names)) < len(names) or ("" in names and len(names) > 1):
        raise Error(f"blocks=: {listed(nested[0] if nested else names)} contain one another, or are named twice")
    return names


def _children(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    found = [f"{path}.{name}" if path else name for name, _ in modules[path].named_children()]
    if not found:
        raise Error(f"{path or 'the model'} has no modules inside that could be walked one after another")
    return found


def _stack(model: nn.Module, weights: Weights) -> str:
    """The one outermost list or sequence of modules."""
    found: list[str] = []
    for path, module in model.named_modules():
        inner = any(not outer or path.startswith(f"{outer}.") for outer in found)
        able = isinstance(module, nn.ModuleList | nn.Sequential) and any(True for _ in module.parameters())
        if able and not inner:
            found.append(path)
    if len(found) > 1:
        try:
            prefix = layers_of(weights).prefix.removesuffix(".")
        except Error:
            prefix = None
        told_by_names = [path for path in found if prefix is not None and _same_end(path, prefix)]
        found = told_by_names or found
    if len(found) != 1:
        which = f"has several stacks of blocks: {listed(found)}" if found else "has no list or sequence of modules"
        raise Error(f"walk goes block by block, and {type(model).__name__} {which}; say with blocks= which modules")
    return found[0]


def _same_end(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


# Names


def naming(model: nn.Module, blocks: Sequence[str], weights: Weights) -> Callable[[str], str]:
    """From a module's names of tensors to those of the weights, which may lack a prefix or have one more."""
    aliases = _aliases(model)
    needed = {f"{b}.{n}".lstrip("."): p for b in blocks for n, p in model.get_submodule(b).named_parameters()}
    if not needed:
        raise Error(f"the blocks {listed(blocks)} have no parameters")
    first = next(iter(needed))
    parts = first.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    shorter = next((end for end in ends if end in weights), None)
    longer = next((name for name in weights if name.endswith(f".{first}")), None)
    ways: list[Callable[[str], str]] = [lambda name: name]
    if shorter:
        ways.append(lambda name: name.removeprefix(first.removesuffix(shorter)))
    if longer:
        ways.append(lambda name: longer.removesuffix(first) + name)
    lacking: list[str] = []
    for way in ways:
        without = [n for n, p in needed.items() if not any(way(a) in weights for a in (n, *aliases.get(id(p), ())))]
        if not without:
            return way
        lacking = lacking or without
    raise Error(
        f"these weights do not fit {type(model).__name__}: its blocks need {listed(lacking)}"
        f"{did_you_mean(lacking[0], weights)}. {FUSED}"
    )


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """Parameter -> every name it has."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


# Values


@dataclass
class Filler:
    """Puts values of weights in the place of a module's own, and its own back."""

    model: nn.Module
    weights: Weights
    named: Callable[[str], str]
    dtype: torch.dtype | None
    device: torch.device
    aliases: dict[int, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.aliases = _aliases(self.model)

    def names(self, path: str) -> dict[str, str]:
        """The parameters and buffers of a part of the model that the weights hold: its name -> theirs."""
        found: dict[str, str] = {}
        part = self.model.get_submodule(path)
        for inner, module in part.named_modules():
            for key, value in (*module._parameters.items(), *_lasting(module)):
                name = ".".join(filter(None, (path, inner, key)))
                if value is not None and (own := self._there(name, value)) is not None:
                    found[name] = own
        return found

    def _there(self, name: str, value: Tensor) -> str | None:
        names = [name, *self.aliases.get(id(value), ())]
        return next((own for own in map(self.named, names) if own in self.weights), None)

    def shared(self, name: str) -> list[str]:
        """Other names of a tensor, in the weights or in the model."""
        node = self.weights.node(name)
        found = [other for other in self.weights if other != name and self.weights.node(other) is node]
        for names in self.aliases.values():
            own = {self.named(alias) for alias in names}
            if len(own) > 1 and name in own:
                found += sorted(own - {name})
        return list(dict.fromkeys(found))

    def fill(self, path: str, module: nn.Module, undo: list[Callable[[], None]], memo: dict[int, Tensor]) -> None:
        """Give a module (not those inside it) its values.

        Args:
            path: its name in the model.
            undo: is given what brings its own back.
            memo: parameter -> what took its place, so that shared ones stay so.
        """
        for key, value in list(module._parameters.items()):
            if value is None:
                continue
            if id(value) not in memo:
                name = f"{path}.{key}" if path else key
                own = self._there(name, value)
                if own is None:
                    raise Error(f"the model needs {name}, which the weights lack. {FUSED}")
                memo[id(value)] = nn.Parameter(self._value(name, own, value), requires_grad=False)
            undo.append(_setter(module._parameters, key, value))
            module._parameters[key] = memo[id(value)]  # type: ignore[assignment]
        lasting = dict(_lasting(module))
        for key, value in list(module._buffers.items()):
            if value is None:
                continue
            name = f"{path}.{key}" if path else key
            own = self._there(name, value) if key in lasting else None
            if own is None and value.is_meta:
                raise Error(
                    f"the buffer {name} has no values, neither in the model nor in the weights; make the model under "
                    "weightsmith.stats.hollow(), which leaves buffers theirs, in place of torch.device('meta')"
                )
            undo.append(_setter(module._buffers, key, value))
            # A copy: layers may write into their buffers.
            new = self._value(name, own, value).clone() if own is not None else value.to(self.device, copy=True)
            module._buffers[key] = new

    def _value(self, name: str, own: str, like: Tensor) -> Tensor:
        # Read, not mapped: pages of a mapped file would count as this program's memory for all of the walk.
        found = materialize(Copied(self.weights.node(own))).detach()
        if found.shape != like.shape:
            raise Error(f"{own} {list(found.shape)} does not fit {name} {list(like.shape)} of the model. {FUSED}")
        wide = self.dtype if found.is_floating_point() else None
        return found.to(self.device, wide or found.dtype)

    @contextmanager
    def filled(self, path: str) -> Iterator[nn.Module]:
        """A part of the model with its values, inside only."""
        part = self.model.get_submodule(path)
        undo: list[Callable[[], None]] = []
        memo: dict[int, Tensor] = {}
        try:
            for inner, module in part.named_modules():
                self.fill(".".join(filter(None, (path, inner))), module, undo, memo)
            yield part
        finally:
            for back in reversed(undo):
                back()

    def replaced(self, path: str, new: Mapping[str, Tensor]) -> None:
        """Other values for parameters of a part that is filled.

        Args:
            new: by the names of the weights.
        """
        part = self.model.get_submodule(path)
        memo: dict[int, nn.Parameter] = {}
        for inner, module in part.named_modules():
            for key, value in list(module._parameters.items()):
                name = self.named(".".join(filter(None, (path, inner, key))))
                if value is not None and name in new:
                    made = nn.Parameter(new[name].detach().to(value.device, value.dtype), requires_grad=False)
                    memo[id(value)] = made
        for module in part.modules():
            for key, value in list(module._parameters.items()):
                if value is not None and id(value) in memo:
                    module._parameters[key] = memo[id(value)]

    @contextmanager
    def stem(self, blocks: Sequence[str]) -> Iterator[Callable[[], bool]]:
        """Modules outside of the blocks get their values when they are first called, inside only.

        Yields:
            a function that gives all of them theirs, and says whether any had none.
        """
        inside = {module for path in blocks for module in self.model.get_submodule(path).modules()}
        waiting = {module: path for path, module in self.model.named_modules() if module not in inside}
        undo: list[Callable[[], None]] = []
        memo: dict[int, Tensor] = {}

        def fill(module: nn.Module, _: Any = None) -> None:
            if module in waiting:
                self.fill(waiting.pop(module), module, undo, memo)

        def everything() -> bool:
            lacking = [module for module in waiting if any(True for _ in module.parameters(recurse=False))]
            for module in list(waiting):
                fill(module)
            return bool(lacking)

        handles = [module.register_forward_pre_hook(fill, prepend=True) for module in waiting]
        try:
            yield everything
        finally:
            for handle in handles:
                handle.remove()
            for back in reversed(undo):
                back()


def _lasting(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    """The buffers that a checkpoint holds."""
    return [(key, value) for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set]


def _setter(place: dict[str, Any], key: str, value: Any) -> Callable[[], None]:
    def back() -> None:
        place[key] = value

    return back


def under(path: str, module: nn.Module) -> nn.Module:
    """A module that has another at a dotted name and nothing else, so that its weights go by their full names."""
    for name in reversed(path.split(".") if path else []):
        holder = nn.Module()
        holder.add_module(name, module)
        module = holder
    return module


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Language models keep no keys and values of earlier tokens: a block is run more than once on the same ones."""
    every: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if hasattr(config, "use_cache")}
    before = {key: config.use_cache for key, config in configs.items()}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]


def prefix_of(model: nn.Module, path: str, named: Callable[[str], str]) -> str:
    """The name of a block in the weights."""
    first = next(iter(model.get_submodule(path).state_dict(keep_vars=True)), "")
    return named(f"{path}.{first}".lstrip(".")).removesuffix(first).removesuffix(".") if first else path
