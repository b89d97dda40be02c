"""From a document of a mergekit file to what it asks for, with every key checked. Nothing is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.errors import Error, did_you_mean
from weightsmith.recipe._mergekit_methods import METHODS
from weightsmith.recipe._mergekit_values import Level, read_level
from weightsmith.recipe._yaml import Node
from weightsmith.weights import as_dtype

KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
OUR_KEYS = ("seed", "nonfinite")
"""Of ours: the seed of methods that draw by lot, and what becomes of NaN."""

MOE_KEYS = ("experts", "gate_mode", "shared_experts", "experts_per_token")
EVOLVE_KEYS = ("genome", "tasks")

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """A model: a path or a name, and an adapter merged into it."""

    path: str
    lora: str | None = None
    node: Node = field(default_factory=lambda: Node(None), compare=False)

    def __str__(self) -> str:
        return self.path if self.lora is None else f"{self.path}+{self.lora}"


@dataclass(frozen=True)
class Source:
    """Layers of a model, and what is said of it. Without ``layers`` it is the whole model."""

    model: Reference
    layers: tuple[int, int] | None
    parameters: Level
    node: Node


@dataclass(frozen=True)
class Slice:
    """Sources that become the next layers."""

    sources: tuple[Source, ...]
    base: Reference | None
    parameters: Level
    node: Node


@dataclass(frozen=True)
class Module:
    """A part of the model; most have but one."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Level
    node: Node


@dataclass(frozen=True)
class Tokens:
    """What ``tokenizer:`` says."""

    source: str | Reference
    tokens: Mapping[str, Mapping[str, Any]]
    """Sources in it are references, not places yet."""
    multiple: int | None
    node: Node


@dataclass(frozen=True)
class Document:
    """One merge."""

    name: str | None
    method: str
    base: Reference | None
    modules: tuple[Module, ...]
    parameters: Level
    dtype: str | None
    out_dtype: str | None
    tokens: Tokens | None
    chat_template: Node | None
    seed: int
    nonfinite: str
    node: Node

    @property
    def sources(self) -> list[Source]:
        """All sources, in the order of the file."""
        return [source for module in self.modules for one in module.slices for source in one.sources]

    @property
    def references(self) -> list[Reference]:
        """All models, the base first."""
        bases = [self.base, *(one.base for module in self.modules for one in module.slices)]
        found = [*(base for base in bases if base is not None), *(source.model for source in self.sources)]
        if self.tokens is not None:
            found += [one for one in (self.tokens.source, *_named(self.tokens)) if isinstance(one, Reference)]
        return list(dict.fromkeys(found))

    @property
    def levels(self) -> list[Level]:
        """All ``parameters:``."""
        found = [self.parameters]
        for module in self.modules:
            found += [module.parameters, *(one.parameters for one in module.slices)]
        return found + [source.parameters for source in self.sources]


def _named(tokens: Tokens) -> list[Any]:
    wishes = [wish.get("source") for wish in tokens.tokens.values()]
    return [wish.get("model") if isinstance(wish, Mapping) else wish for wish in wishes]


def read_document(node: Node, warn: Warn) -> Document:
    """A merge, or an error with line and column."""
    top = _mapping(node, "a merge")
    _unknown(node, (*KEYS, *OUR_KEYS), "a merge", warn)
    method = _method(node)
    base = _optional(top, "base_model", read_reference)
    given = [key for key in ("models", "slices", "modules") if key in top and top[key].value is not None]
    if len(given) != 1:
        said = f"got {' and '.join(given)}" if given else "there is none"
        raise node.error(f"a merge has one of models:, slices: and modules:; {said}")
    modules = _modules(top, given[0], method, base, warn)
    if "tokenizer" in top and "tokenizer_source" in top:
        raise node.at("tokenizer_source").error("give tokenizer: or tokenizer_source:, not both")
    tokens = _optional(top, "tokenizer", lambda one: _tokens(one, warn))
    if "tokenizer_source" in top and top["tokenizer_source"].value is not None:
        source = top["tokenizer_source"]
        tokens = Tokens(_token_source(source), {}, None, source)
    template = top.get("chat_template")
    if template is not None and not isinstance(template.value, str | None):
        raise template.error("chat_template: is a name, as chatml, or a template in Jinja")
    seed = plain_number(top["seed"], "seed") if "seed" in top else 0
    nonfinite = top["nonfinite"].value if "nonfinite" in top else "refuse"
    if nonfinite not in ("refuse", "allow"):
        raise top["nonfinite"].error(f"nonfinite: is refuse or allow, got {nonfinite!r}")
    document = Document(
        name=_optional(top, "name", _word),
        method=method,
        base=base,
        modules=modules,
        parameters=read_level(top.get("parameters"), method, "the merge", warn, source=False),
        dtype=_optional(top, "dtype", _dtype),
        out_dtype=_optional(top, "out_dtype", _dtype),
        tokens=tokens,
        chat_template=template if template is not None and template.value else None,
        seed=seed,
        nonfinite=nonfinite,
        node=node,
    )
    _check_inputs(document, warn)
    return document


def _method(node: Node) -> str:
    found = node.value.get("merge_method")
    if found is None or found.value is None:
        raise node.error(f"a merge needs merge_method:, one of {', '.join(METHODS)}")
    if found.value not in METHODS:
        near = did_you_mean(str(found.value).lower().replace("-", "_"), METHODS)
        raise found.error(f"there is no merge method {found.value!r}{near}; there are {', '.join(METHODS)}")
    return found.value


# Models


def read_reference(node: Node) -> Reference:
    """``path``, ``org/name@revision``, ``base+lora``, or the same as a mapping."""
    if isinstance(node.value, str) and node.value.strip():
        path, lora = _parts(node.value)
        return Reference(path, lora, node)
    if not isinstance(node.value, Mapping):
        raise node.error(f"a model is a path or a name, got {node.value!r}")
    for key in node.value:
        if key == "override_architecture" and node.value[key].value is not None:
            raise node.at(key).error(
                "override_architecture is not supported, and not needed: tensors are known by their names; leave it out"
            )
        if key not in ("model", "lora", "override_architecture"):
            raise node.at(key).error(
                f"a model has no key {key!r}{did_you_mean(str(key), ('model', 'lora'))}; it has model and lora"
            )
    if "model" not in node.value:
        raise node.error("a model given as a mapping needs model:")
    model = _place(node.value["model"])
    path, lora = _parts(model) if isinstance(node.value["model"].value, str) else (model, None)
    if "lora" in node.value and node.value["lora"].value is not None:
        lora = _place(node.value["lora"])
    return Reference(path, lora, node)


def _place(node: Node) -> str:
    if isinstance(node.value, str) and node.value.strip():
        return node.value
    if not isinstance(node.value, Mapping) or "path" not in node.value:
        raise node.error(f"a model is a path, or a mapping with path:, got {node.value!r}")
    for key in node.value:
        if key not in ("path", "revision"):
            raise node.at(key).error(f"a path has no key {key!r}{did_you_mean(str(key), ('path', 'revision'))}")
    revision = node.value.get("revision")
    path = _word(node.value["path"])
    return path if revision is None or revision.value is None else f"{path}@{revision.value}"


def _parts(text: str) -> tuple[str, str | None]:
    """A model and its adapter. What is there under the whole name is meant whole."""
    if os.path.exists(text):
        return text, None
    model, plus, lora = text.partition("+")
    return (model, lora) if plus and model and lora else (text, None)


def _sources(node: Node, method: str, layered: bool, warn: Warn) -> tuple[Source, ...]:
    what = "sources" if layered else "models"
    if not isinstance(node.value, list) or not node.value:
        raise node.error(f"{what}: must be a list with at least one model")
    keys = ("model", "layer_range", "parameters") if layered else ("model", "parameters")
    found = []
    for entry in node.value:
        inner = _mapping(entry, "an entry of " + what)
        if not layered and "layer_range" in inner:
            raise entry.at("layer_range").error("layer_range: belongs to slices:, not to models:")
        _unknown(entry, keys, "an entry of " + what, warn)
        if "model" not in inner or inner["model"].value is None:
            raise entry.error(f"an entry of {what} needs model:")
        layers = _layers(entry) if layered else None
        level = read_level(inner.get("parameters"), method, "a model", warn, source=True)
        found.append(Source(read_reference(inner["model"]), layers, level, entry))
    return tuple(found)


def _layers(entry: Node) -> tuple[int, int]:
    node = entry.value.get("layer_range")
    if node is None or node.value is None:
        raise entry.error("a source of a slice needs layer_range: [first, end]")
    values = [one.value for one in node.value] if isinstance(node.value, list) else []
    if len(values) != 2 or not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
        raise node.error("layer_range: is [first, end], two whole numbers; the end is not included")
    start, stop = values
    if not 0 <= start <= stop:
        raise node.error(f"layer_range: [{start}, {stop}] runs backwards or below 0")
    return start, stop


def _modules(
    top: Mapping[str, Node], given: str, method: str, base: Reference | None, warn: Warn
) -> tuple[Module, ...]:
    node = top[given]
    if given != "modules":
        return (Module(None, _slices(top, method, base, warn), {}, node),)
    found = []
    for name, module in _mapping(node, "modules").items():
        inner = _mapping(module, f"the module {name}")
        _unknown(module, ("slices", "models", "parameters"), f"the module {name}", warn)
        if ("slices" in inner) == ("models" in inner):
            raise module.error(f"the module {name} needs models: or slices:")
        level = read_level(inner.get("parameters"), method, f"the module {name}", warn, source=False)
        found.append(Module(str(name), _slices(inner, method, base, warn), level, module))
    if not found:
        raise node.error("modules: is empty")
    return tuple(found)


def _slices(inner: Mapping[str, Node], method: str, base: Reference | None, warn: Warn) -> tuple[Slice, ...]:
    if "models" in inner:
        node = inner["models"]
        sources = _sources(node, method, False, warn)
        if base is not None and base not in [source.model for source in sources]:
            sources = (*sources, Source(base, None, {}, base.node))
            if METHODS[method].base == "merged":
                warn(
                    _at(
                        base.node, f"{method} has no base: the base_model is merged as one more model, as mergekit does"
                    )
                )
        return (Slice(sources, base, {}, node),)
    node = inner["slices"]
    if not isinstance(node.value, list) or not node.value:
        raise node.error("slices: must be a list with at least one slice")
    found = []
    for entry in node.value:
        one = _mapping(entry, "a slice")
        if "residual_weight" in one and one["residual_weight"].value is not None:
            raise entry.at("residual_weight").error("residual_weight is not supported (nor does mergekit use it)")
        _unknown(entry, ("sources", "base_model", "parameters", "residual_weight"), "a slice", warn)
        if "sources" not in one:
            raise entry.error("a slice needs sources:")
        sources = _sources(one["sources"], method, True, warn)
        depths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(depths) > 1:
            raise one["sources"].error(f"all sources of a slice need as many layers; these have {sorted(depths)}")
        own = _optional(one, "base_model", read_reference) or base
        level = read_level(one.get("parameters"), method, "a slice", warn, source=False)
        found.append(Slice(sources, own, level, entry))
    return tuple(found)


def _check_inputs(document: Document, warn: Warn) -> None:
    """As many models as the method needs, the base among them."""
    method = METHODS[document.method]
    for module in document.modules:
        for one in module.slices:
            models = [source.model for source in one.sources]
            merged, which = len(models), ""
            if method.base != "merged":
                if one.base is None and method.base == "needed":
                    raise document.node.error(f"{document.method} needs base_model:")
                if one.base is not None and one.base not in models:
                    raise one.node.error(
                        f"the base_model {one.base} is not among the sources of this slice, with the layers that it is "
                        "to give; add it"
                    )
                merged -= one.base is not None
                which = " beside the base"
            if merged < method.least or (method.most is not None and merged > method.most):
                wanted = f"exactly {method.least}" if method.most == method.least else f"at least {method.least}"
                noun = "model" if method.least == 1 else "models"
                raise one.node.error(f"{document.method} needs {wanted} {noun}{which}, got {merged}")


# The rest


def _tokens(node: Node, warn: Warn) -> Tokens:
    inner = _mapping(node, "tokenizer")
    _unknown(node, ("source", "tokens", "pad_to_multiple_of"), "tokenizer", warn)
    source = _token_source(inner["source"]) if "source" in inner else "union"
    wishes: dict[str, Mapping[str, Any]] = {}
    if "tokens" in inner and inner["tokens"].value is not None:
        for token, wish in _mapping(inner["tokens"], "tokens").items():
            wishes[str(token)] = _wish(wish, str(token), warn)
    multiple = None
    if "pad_to_multiple_of" in inner and inner["pad_to_multiple_of"].value is not None:
        multiple = plain_number(inner["pad_to_multiple_of"], "pad_to_multiple_of")
        if multiple < 1:
            raise inner["pad_to_multiple_of"].error(f"pad_to_multiple_of: must be at least 1, got {multiple}")
    return Tokens(source, wishes, multiple, node)


def _token_source(node: Node) -> str | Reference:
    return node.value if node.value in ("union", "base") else read_reference(node)


def _wish(node: Node, token: str, warn: Warn) -> Mapping[str, Any]:
    inner = _mapping(node, f"the token {token}")
    _unknown(node, ("source", "force"), f"the token {token}", warn)
    found: dict[str, Any] = {}
    source = inner.get("source")
    if source is not None and isinstance(source.value, Mapping) and "kind" in source.value:
        kind = source.value["kind"].value
        if kind not in ("zero", "model_token"):
            raise source.at("kind").error(f"the token {token}: kind is zero or model_token, got {kind!r}")
        _unknown(source, ("kind", "model", "token", "token_id"), f"the source of the token {token}", warn)
        found["source"] = {key: one.value for key, one in source.value.items() if key in ("kind", "token", "token_id")}
        if kind == "model_token":
            if "model" not in source.value:
                raise source.error(f"the token {token}: a model_token needs model:")
            found["source"]["model"] = read_reference(source.value["model"])
            if ("token" in source.value) == ("token_id" in source.value):
                raise source.error(f"the token {token}: a model_token needs token: or token_id:")
    elif source is not None and source.value is not None:
        found["source"] = read_reference(source)
    if "force" in inner:
        if not isinstance(inner["force"].value, bool):
            raise inner["force"].error("force: is true or false")
        found["force"] = inner["force"].value
    return found


def _dtype(node: Node) -> str:
    word = _word(node)
    try:
        found = as_dtype(word.removeprefix("torch."))
    except Error as error:
        raise node.error(str(error)) from None
    if not found.is_floating_point:
        raise node.error(f"weights are merged as floats, not as {word}")
    return word.removeprefix("torch.")


def plain_number(node: Node, name: str) -> int:
    """A whole number."""
    if isinstance(node.value, bool) or not isinstance(node.value, int):
        raise node.error(f"{name}: needs a whole number, got {node.value!r}")
    return node.value


def _word(node: Node) -> str:
    if not isinstance(node.value, str) or not node.value.strip():
        raise node.error(f"needs a word, got {node.value!r}")
    return node.value


def _optional(inner: Mapping[str, Node], key: str, read: Callable[[Node], Any]) -> Any:
    node = inner.get(key)
    return None if node is None or node.value is None else read(node)


def _mapping(node: Node, what: str) -> Mapping[Any, Node]:
    if not isinstance(node.value, Mapping):
        raise node.error(f"{what} must be a mapping of names to values, got {_kind(node.value)}")
    return node.value


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "nothing" if value is None else repr(value)


def _unknown(node: Node, known: Sequence[str], what: str, warn: Warn) -> None:
    for key in node.value:
        if key not in known:
            near = did_you_mean(str(key), known)
            warn(_at(node.at(key), f"{what} has no key {key!r}{near}; it is ignored"))


def _at(node: Node, text: str) -> str:
    return f"{node.file}:{node.line}:{node.column}: {text}"


_NAMES = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def resolve(reference: str) -> str:
    """The place of a model on this machine: a path as it is, a name from the cache of the Hugging Face hub.

    Nothing is downloaded.

    Raises:
        Error: it is neither, with what to do.
    """
    if os.path.exists(reference) or "://" in reference:
        return reference
    name, _, revision = reference.partition("@")
    if os.path.exists(name):
        return name  # a folder of one's own has no revisions
    folder = os.path.dirname(name) or "."
    near = did_you_mean(os.path.basename(name), os.listdir(folder) if os.path.isdir(folder) else [])
    if not _NAMES.match(name):
        raise Error(f"{name}: no such file or folder{near}")
    cache = _cache()
    stored = os.path.join(cache, "models--" + name.replace("/", "--"))
    revision = revision or "main"
    pointer = os.path.join(stored, "refs", revision)
    if ".." not in revision.split("/") and os.path.isfile(pointer):
        with open(pointer, encoding="utf-8") as file:
            commit = file.read().strip()
    else:
        commit = revision
    snapshot = os.path.join(stored, "snapshots", commit)
    if commit and "/" not in commit and commit not in (".", "..") and os.path.isdir(snapshot):
        return snapshot
    what = f"{name}@{revision}" if revision != "main" else name
    raise Error(
        f"{what}: no such folder{near}, and not in the cache at {cache}. Nothing is downloaded here: fetch it with "
        f"`hf download {name}{f' --revision {revision}' if revision != 'main' else ''}`, or give the path of a copy"
    )


def _cache() -> str:
    """Where the hub's own tools keep what they downloaded."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return os.path.expanduser(os.environ[variable])
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "huggingface"
    )
    return os.path.join(os.path.expanduser(home), "hub")
