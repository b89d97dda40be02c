"""Opening anything that holds weights: a path, an address, a module, a mapping.

What a file is, is told by its first bytes, not by its name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import Error, FormatError, did_you_mean, listed
from weightsmith.weights._files import (
    Bytes,
    Folder,
    LocalFile,
    LocalFolder,
    check_json,
    checked_name,
    is_remote,
    read_bytes,
)
from weightsmith.weights._layout import Contents
from weightsmith.weights._lazy import sources
from weightsmith.weights._lineage import Step, parsed
from weightsmith.weights._weights import Weights

FORMATS = ("safetensors", "pt", "gguf", "npz")

SUFFIXES = {".safetensors": "safetensors", ".gguf": "gguf", ".npz": "npz"}
SUFFIXES |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "pt")

# PyTorch files that training leaves beside a model and that are not the model.
NOT_MODELS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth)$")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
_LARGEST_INDEX = 200_000_000
_LARGEST_COMPANION = 100_000_000
_WEIGHTS = (*SUFFIXES, ".h5", ".msgpack", ".onnx", ".index.json", ".ot", ".tflite")


def open(
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    format: str | None = None,
    at: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Weights:
    """Weights from a path, an address, a module or a mapping. Only headers are read.

    Args:
        source: a Hugging Face folder, a ``.safetensors``, ``.pt``/``.pth``/``.bin``/``.ckpt``,
            ``.gguf`` or ``.npz`` file, an ``fsspec`` address (``s3://...``), an ``nn.Module`` or a
            state dict. ``path::name`` is short for ``at=name``.
        format: which one to take in a folder that holds several: safetensors, pt or gguf.
        at: a part of nested PyTorch file, such as ``"state_dict"``.
        dtype: cast the floats to this dtype; for GGUF the dtype to dequantize to.
        device: deliver the values there.

    Raises:
        FormatError: the file is damaged, lies about itself, or is not safe to read.
        Error: there is nothing to open, or it is not clear what.
    """
    weights = _opened(source, format, at, dtype)
    if dtype is not None:
        weights = weights.cast(dtype)
    return weights if device is None else weights.to(device)


def _opened(source: Any, format: str | None, at: str | None, dtype: torch.dtype | str | None) -> Weights:
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        state = {k: v for k, v in source.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
        weights = Weights.of(state, type(source).__name__)
        weights.lineage = Step("module", {"class": type(source).__name__})
        return weights
    if isinstance(source, Mapping):
        return Weights.of(source)
    if not isinstance(source, str | os.PathLike):
        raise Error(f"cannot open a {type(source).__name__}; give a path, a module or a mapping of tensors")
    if format is not None and format not in FORMATS:
        raise Error(f"unknown format {format!r}{did_you_mean(format, FORMATS)}; known: {', '.join(FORMATS)}")
    path = os.fspath(source)
    if at is None and "::" in path and not os.path.exists(path):
        path, at = path.rsplit("::", 1)
    contents, files = _contents(path, format, at, dtype)
    options = {"path": _said(path)} | ({"at": at} if at else {})
    step = Step("open", options, (), tuple(files), parsed(contents.metadata))
    return Weights(contents.nodes, step, contents.files, contents.metadata)


def _contents(
    path: str, format: str | None, at: str | None, dtype: torch.dtype | str | None
) -> tuple[Contents, list[Bytes]]:
    if is_remote(path):
        from weightsmith.weights import _remote

        found = _remote.find(path)
        if isinstance(found, _remote.RemoteFolder):
            return read_folder(found, format, at, dtype)
        return read_file(found, format, at, dtype), [found]
    if not os.path.exists(path):
        near = os.listdir(os.path.dirname(path) or ".") if os.path.isdir(os.path.dirname(path) or ".") else []
        raise Error(f"{path}: no such file or folder{did_you_mean(os.path.basename(path), near)}")
    if os.path.isdir(path):
        return read_folder(LocalFolder(path), format, at, dtype)
    file = LocalFile(path)
    if path.endswith(".index.json"):
        folder = LocalFolder(os.path.dirname(path) or ".")
        return read_shards(folder, _indexed(folder, os.path.basename(path)), at, dtype)
    return read_file(file, format, at, dtype), [file]


def _said(path: str) -> str:
    """A path for the lineage: addresses without the secrets that may be in them."""
    if not is_remote(path):
        return path
    from weightsmith.weights import _remote

    return _remote.shown(path)


def read_file(file: Bytes, format: str | None, at: str | None, dtype: torch.dtype | str | None) -> Contents:
    """The contents of one file, by what its first bytes say it is."""
    found = sniff(file)
    if format is not None and found != format:
        raise FormatError(f"{file.name}: is {found or 'of an unknown kind'}, not {format}")
    if at is not None and found != "pt":
        raise Error(f"{file.name}: only PyTorch files are nested; {found} has no part {at!r}")
    if found == "safetensors":
        from weightsmith.weights import _safetensors

        return _safetensors.read(file)
    if found == "npz":
        from weightsmith.weights import _npz

        return _npz.read(file)
    if found == "gguf":
        from weightsmith.weights import _gguf

        return _gguf.read(file, file.path if isinstance(file, LocalFile) else None, dtype)
    if found == "pt":
        from weightsmith.weights import _torchfile

        return _torchfile.read(file, at)
    raise FormatError(
        f"{file.name}: neither safetensors, PyTorch, GGUF nor npz"
        + (" (the file is empty)" if file.size == 0 else " by its first bytes; it may be truncated or something else")
    )


def sniff(file: Bytes) -> str | None:
    """The format that a file's first bytes announce."""
    start = read_bytes(file, 0, min(file.size, 64))
    if start.startswith(b"GGUF"):
        return "gguf"
    if start.startswith(b"PK"):
        return "npz" if file.name.endswith(".npz") or b".npy" in start else "pt"
    if start[8:9] == b"{":
        return "safetensors"
    if start[:1] == b"\x80":
        return "pt"
    return SUFFIXES.get(os.path.splitext(file.name)[1])


def read_folder(
    folder: Folder, format: str | None, at: str | None, dtype: torch.dtype | str | None
) -> tuple[Contents, list[Bytes]]:
    """The one checkpoint of a folder, with the small files beside it."""
    names = folder.names()
    # With format= nobody asks what the others are: a stray file of theirs is no matter then.
    kinds = (format,) if format is not None else ("safetensors", "pt", "gguf", "npz")
    found = {kind: shards for kind in kinds if (shards := _shards_of(folder, names, kind))}
    if format is not None and not found:
        others = {SUFFIXES[end] for name in names if "/" not in name and (end := os.path.splitext(name)[1]) in SUFFIXES}
        raise Error(f"{folder.name}: has no {format} weights; it has {', '.join(sorted(others)) or 'none at all'}")
    if not found:
        raise Error(f"{folder.name}: no weights in this folder (looked for {', '.join(SUFFIXES)})")
    if len(found) > 1:
        raise FormatError(
            f"{folder.name}: has weights in several formats ({', '.join(found)}), which may differ; "
            f"say which with format={next(iter(found))!r}"
        )
    contents, files = read_shards(folder, next(iter(found.values())), at, dtype)
    contents.files = {name: folder.file(name) for name in names if _is_companion(name)} | contents.files
    contents.files = {
        name: file
        for name, file in contents.files.items()
        if isinstance(file, bytes) or file.size <= _LARGEST_COMPANION
    }
    return contents, files


def _is_companion(name: str) -> bool:
    return not name.endswith(_WEIGHTS) and "checkpoint-" not in name


def _shards_of(folder: Folder, names: list[str], kind: str) -> dict[str, list[str] | None]:
    """Shard -> the tensors an index promises in it (None without an index). Empty if there is none."""
    top = [name for name in names if "/" not in name]
    mine = [name for name in top if SUFFIXES.get(os.path.splitext(name)[1]) == kind and not NOT_MODELS.match(name)]
    stems = {"safetensors": "model.safetensors", "pt": "pytorch_model.bin"}
    usual = stems.get(kind, "")
    suffixes = tuple(s for s, k in SUFFIXES.items() if k == kind)
    indices = [name for name in top if name.endswith(tuple(f"{s}.index.json" for s in suffixes))]
    if f"{usual}.index.json" in indices:
        return _indexed(folder, f"{usual}.index.json")
    if usual in mine:
        return {usual: None}
    if len(indices) == 1:
        return _indexed(folder, indices[0])
    if len(mine) > 1:
        _check_complete(folder, mine)
    return dict.fromkeys(mine)


def _check_complete(folder: Folder, mine: list[str]) -> None:
    """Several files without an index are one checkpoint only if they are numbered shards, all there."""
    parts = [_SHARD.match(name) for name in mine]
    kinds = {(part["stem"], part["count"]) for part in parts if part}
    if None in parts or len(kinds) != 1:
        raise Error(f"{folder.name}: holds several checkpoints ({listed(mine)}); open one of the files")
    (stem, count) = kinds.pop()
    there = {int(part["number"]) for part in parts if part}
    lacking = sorted(set(range(1, int(count) + 1)) - there)
    if lacking:
        raise FormatError(f"{folder.name}: shard {lacking[0]} of {int(count)} of {stem} is missing")


def _indexed(folder: Folder, index: str) -> dict[str, list[str] | None]:
    file = folder.file(index)
    if file.size > _LARGEST_INDEX:
        raise FormatError(f"{file.name}: an index of {file.size} bytes is not believable")
    try:
        raw = read_bytes(file, 0, file.size)
        check_json(raw, file.name)
        tensors = json.loads(raw)["weight_map"]
        pairs = [(str(tensor), checked_name(shard, file.name)) for tensor, shard in tensors.items()]
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{file.name}: no valid index with a weight_map: {str(error)[:200]}") from None
    shards: dict[str, list[str] | None] = {}
    for tensor, shard in pairs:
        shards.setdefault(shard, [])
        shards[shard].append(tensor)  # type: ignore[union-attr]
    return shards


def read_shards(
    folder: Folder, shards: Mapping[str, list[str] | None], at: str | None, dtype: torch.dtype | str | None
) -> tuple[Contents, list[Bytes]]:
    """Several files as one. Every promised tensor must be where it was promised, and no name twice."""
    whole = Contents({})
    files: list[Bytes] = []
    owner: dict[str, str] = {}
    there = set(folder.names())
    for shard, promised in shards.items():
        if shard not in there:
            raise FormatError(f"{folder.name}: the shard {shard} is missing" + _promise(promised))
        file = folder.file(shard)
        files.append(file)
        part = read_file(file, None, at, dtype)
        lacking = [name for name in promised or () if name not in part.nodes]
        if lacking:
            raise FormatError(f"{file.name}: the index promises {listed(lacking)}, which this shard does not have")
        for name in part.nodes:
            if name in owner:
                raise FormatError(f"{folder.name}: the tensor {name!r} is in both {owner[name]} and {shard}")
            owner[name] = shard
        whole.nodes |= part.nodes
        whole.metadata |= part.metadata
        whole.files |= part.files
    if len(shards) > 1:
        whole.metadata.update(_index_words(folder, there))
    return whole, files


def _index_words(folder: Folder, names: set[str]) -> dict[str, str]:
    for name in sorted(names):
        if name.endswith(".index.json") and "/" not in name:
            file = folder.file(name)
            try:
                words = json.loads(read_bytes(file, 0, min(file.size, _LARGEST_INDEX))).get("metadata", {})
                return {str(key): value for key, value in words.items() if isinstance(value, str)}
            except (ValueError, AttributeError, RecursionError):
                return {}
    return {}


def _promise(promised: list[str] | None) -> str:
    return f", which the index says holds {listed(promised, 3)}" if promised else ""


def input_files(weights: Weights) -> list[LocalFile]:
    """The local files that weights still read from."""
    nodes = [source for name in weights for source in sources(weights.node(name))]
    files = [*(getattr(node, "file", None) for node in nodes), *weights.files.values()]
    return list({id(file): file for file in files if isinstance(file, LocalFile)}.values())
