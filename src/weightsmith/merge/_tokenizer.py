"""Tokenizers as the words they are written in: what their tokens are called, and one made of several.

Everything here works on the JSON of ``tokenizer.json`` (the format of the package ``tokenizers``),
so that no tokenizer has to be built to learn which row of an embedding belongs to which token.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from weightsmith.errors import Error, FormatError, missing

File = Any
"""``bytes``, or what has a ``size`` and a ``read_into``."""

KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")

SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt")
"""Vocabularies in other files than ``tokenizer.json``."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    *SLOW,
)
"""All that belongs to a tokenizer in a folder."""

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""An added token of which nothing else is said."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """What ``tokenizer.json`` says, and the files it stands among."""

    where: str
    """For messages."""
    data: Mapping[str, Any]
    files: Mapping[str, File]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.data["model"]

    @property
    def added(self) -> list[dict[str, Any]]:
        return list(self.data.get("added_tokens") or ())

    @cached_property
    def kind(self) -> str:
        """BPE, WordPiece, WordLevel or Unigram. Old files do not say it."""
        model = self.model
        if "type" in model:
            return str(model["type"])
        if "merges" in model:
            return "BPE"
        if isinstance(model.get("vocab"), list):
            return "Unigram"
        return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"

    @cached_property
    def own(self) -> dict[str, int]:
        """The tokens of the model, without those added to it."""
        vocab = self.model["vocab"]
        return {piece: index for index, (piece, _) in enumerate(vocab)} if self.kind == "Unigram" else dict(vocab)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id, as the package counts: ids of added tokens are given anew when a file is loaded."""
        ids, free = dict(self.own), itertools.count(len(self.own))
        for entry in self.added:
            if entry["content"] not in ids:
                ids[entry["content"]] = next(free)
        return ids

    @cached_property
    def spelling(self) -> str:
        """How a space is written in a token. Tokens of unlike spelling mean different text."""
        types = set(_types([self.data.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]))
        if "ByteLevel" in types:
            return "bytes (a space is \u0120)"
        return "a space is \u2581" if "Metaspace" in types or "\u2581" in str(self.data.get("normalizer")) else "plain"


def _types(part: Any) -> Iterable[str]:
    if isinstance(part, list):
        for one in part:
            yield from _types(one)
    elif isinstance(part, Mapping):
        yield str(part.get("type"))
        yield from _types([value for value in part.values() if isinstance(value, list)])


# Reading


def content(file: File) -> bytes:
    """All bytes of a file beside the tensors."""
    if isinstance(file, bytes):
        return file
    buffer = bytearray(file.size)
    file.read_into(0, memoryview(buffer))
    return bytes(buffer)


def parsed(files: Mapping[str, File], name: str, where: str) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if name not in files:
        return {}
    try:
        found = json.loads(content(files[name]))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: {name} is no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where}: {name} holds a {type(found).__name__}, not an object")
    return found


def written(data: Mapping[str, Any]) -> bytes:
    """JSON as these files are usually written."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def read(files: Mapping[str, File], where: str) -> Tokenizer | None:
    """The tokenizer among some files; None if there is none.

    Where there is no ``tokenizer.json``, transformers is asked to make one from what there is.

    Raises:
        FormatError: a file does not hold what its name says.
        MissingPackage: only transformers could read the tokenizer, and it is not installed.
    """
    mine = {name: files[name] for name in FILES if name in files}
    if "tokenizer.json" in mine:
        data = parsed(mine, "tokenizer.json", where)
    else:
        slow = [name for name in SLOW if name in mine]
        if not slow:
            return None
        data = json.loads(_converted(mine | {n: files[n] for n in ("config.json",) if n in files}, slow, where))
    _check(data, f"{where}: tokenizer.json")
    return _with_late(Tokenizer(where, data, mine))


def _check(data: Mapping[str, Any], where: str) -> None:
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, list | Mapping):
        raise FormatError(f"{where} has no model with a vocab")
    kind = Tokenizer(where, data, {}).kind
    if kind not in KINDS:
        raise FormatError(f"{where} is of the type {kind!r}; known: {', '.join(KINDS)}")
    pieces = vocab if kind == "Unigram" else vocab.items() if isinstance(vocab, Mapping) else None
    number = int | float if kind == "Unigram" else int
    try:
        if pieces is None or not all(isinstance(token, str) and isinstance(value, number) for token, value in pieces):
            raise TypeError
        if not all(isinstance(entry["content"], str) for entry in data.get("added_tokens") or ()):
            raise TypeError
    except (TypeError, ValueError, KeyError):
        raise FormatError(f"{where}: its tokens are not written as those of a {kind} are") from None
    if kind == "BPE":
        try:
            for merge in model["merges"]:  # type: ignore[index]
                pair(merge)
        except (TypeError, ValueError, KeyError):
            raise FormatError(f"{where}: its merges are not written as pairs of tokens") from None


def _with_late(tokenizer: Tokenizer) -> Tokenizer:
    """With the tokens that other files add, as transformers adds them on loading."""
    config = parsed(tokenizer.files, "tokenizer_config.json", tokenizer.where)
    decoder = config.get("added_tokens_decoder")
    late: dict[int, dict[str, Any]] = {}
    for token, index in parsed(tokenizer.files, "added_tokens.json", tokenizer.where).items():
        if isinstance(index, int):
            late[index] = {**PLAIN, "content": token}
    for index, entry in decoder.items() if isinstance(decoder, dict) else ():
        if str(index).isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            late[int(index)] = {**PLAIN, **{key: entry[key] for key in (*PLAIN, "content") if key in entry}}
    fresh = [late[index] for index in sorted(late) if late[index]["content"] not in tokenizer.ids]
    if not fresh:
        return tokenizer
    made = replace(tokenizer, data={**tokenizer.data, "added_tokens": [*tokenizer.added, *fresh]})
    added = [{**entry, "id": made.ids[entry["content"]]} for entry in made.added]
    return replace(made, data={**made.data, "added_tokens": added})


def _converted(files: Mapping[str, File], slow: Sequence[str], where: str) -> str:
    """``tokenizer.json`` as transformers makes it from other files, without the network."""
    try:
        import transformers
    except ImportError:
        raise missing("transformers", "hf", f"{where}: reading a tokenizer from {', '.join(slow)}") from None
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files.items():
            Path(folder, name).write_bytes(content(file))
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            return loaded.backend_tokenizer.to_str()
        except Exception as error:  # whatever goes wrong in there, what to do is the same
            told = str(error).replace(folder + os.sep, "").replace(folder, "the folder").strip().split("\n")[0][:200]
            raise Error(
                f"{where}: transformers cannot make a tokenizer.json from {', '.join(slow)} "
                f"({type(error).__name__}: {told}); save the tokenizer as a fast one and put tokenizer.json beside it"
            ) from None


# Making others


def trimmed(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """Without the tokens for which an embedding of so many rows has none."""
    ids = {token: index for token, index in tokenizer.ids.items() if index < rows}
    if len(ids) == len(tokenizer.ids):
        return tokenizer
    scores = dict(map(tuple, tokenizer.model["vocab"])) if tokenizer.kind == "Unigram" else {}
    model = {**tokenizer.model, "type": tokenizer.kind, "vocab": _vocab(tokenizer, ids, scores)}
    if tokenizer.kind == "BPE":
        glue = len(model.get("continuing_subword_prefix") or "")
        parts = ((merge, *pair(merge)) for merge in model["merges"])
        model["merges"] = [m for m, left, right in parts if {left, right, left + right[glue:]} <= ids.keys()]
    added = [entry | {"id": ids[entry["content"]]} for entry in tokenizer.added if entry["content"] in ids]
    return _remade(tokenizer, {**tokenizer.data, "model": model, "added_tokens": added}, ids)


def pair(merge: Any) -> tuple[str, str]:
    """A merge of BPE, which may be written ``"a b"`` or ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return str(left), str(right)


def check_alike(reference: Tokenizer, other: Tokenizer) -> None:
    """An error unless equal words of two tokenizers mean equal text."""
    marks = ("continuing_subword_prefix", "end_of_word_suffix")
    for what, one, two in (
        ("type", reference.kind, other.kind),
        ("spelling of tokens", reference.spelling, other.spelling),
        *((mark, reference.model.get(mark) or "", other.model.get(mark) or "") for mark in marks),
    ):
        if one != two:
            raise Error(
                f"the tokenizers of {reference.where} and {other.where} cannot be brought together: "
                f"their {what} differs, {one!r} against {two!r}"
            )


def joined(reference: Tokenizer, others: Iterable[Tokenizer], more: Iterable[str] = ()) -> Tokenizer:
    """The reference with what the others have more, and with further words.

    Ids of the reference stay. Tokens of the others follow, model by model in the order of their ids;
    then the further words, as added tokens. A BPE gets the others' merges after its own: a text
    is cut as before, and then on where another's merges reach. Scores of Unigram pieces are kept.

    Returns:
        Tokenizer: the reference itself where there is nothing to add.
    """
    ids = dict(reference.ids)
    free = itertools.count(max(ids.values(), default=-1) + 1)
    added = {entry["content"]: {**entry, "id": ids[entry["content"]]} for entry in reference.added}
    merges = dict.fromkeys(pair(merge) for merge in reference.model["merges"]) if reference.kind == "BPE" else {}
    scores = dict(map(tuple, reference.model["vocab"])) if reference.kind == "Unigram" else {}
    before = len(added), len(merges)
    for other in others:
        for token in sorted(other.ids, key=other.ids.__getitem__):
            if token not in ids:
                ids[token] = next(free)
        for entry in other.added:
            added.setdefault(entry["content"], {**entry, "id": ids[entry["content"]]})
        if reference.kind == "BPE":
            merges.update(dict.fromkeys(pair(merge) for merge in other.model["merges"]))
        elif reference.kind == "Unigram":
            scores = dict(map(tuple, other.model["vocab"])) | scores
    for token in more:
        if token not in ids:
            ids[token] = next(free)
            added[token] = {**PLAIN, "content": token, "id": ids[token]}
    if len(ids) == len(reference.ids) and (len(added), len(merges)) == before:
        return reference
    model = {**reference.model, "type": reference.kind, "vocab": _vocab(reference, ids, scores)}
    if reference.kind == "BPE":
        as_words = all(isinstance(merge, str) for merge in reference.model["merges"]) and not any(
            " " in part for merge in merges for part in merge
        )
        model["merges"] = [" ".join(merge) if as_words else list(merge) for merge in merges]
    entries = sorted(added.values(), key=lambda entry: entry["id"])
    return _remade(reference, {**reference.data, "model": model, "added_tokens": entries}, ids)


def _vocab(reference: Tokenizer, ids: Mapping[str, int], scores: Mapping[str, float]) -> Any:
    """All tokens as the model's own, added ones too: only so do they keep their ids on loading."""
    if reference.kind != "Unigram":
        return dict(sorted(ids.items(), key=lambda item: item[1]))
    # What has no score is an added token, which is cut out of the text before scores are looked at. The
    # least of the scores stays the least, for the price of an unknown character hangs on it.
    least = min(scores.values(), default=0.0)
    return [[token, scores.get(token, least)] for token in sorted(ids, key=ids.__getitem__)]


def _remade(reference: Tokenizer, data: Mapping[str, Any], ids: Mapping[str, int]) -> Tokenizer:
    """The reference with other tokens; its files say so too. What cannot be rewritten is left out of them."""
    files = {name: file for name, file in reference.files.items() if not name.endswith(".model")}
    files["tokenizer.json"] = written(data)
    if "vocab.json" in files:
        files["vocab.json"] = (json.dumps(data["model"]["vocab"], ensure_ascii=False) + "\n").encode()
    if "merges.txt" in files:
        lines = (" ".join(pair(merge)) for merge in data["model"]["merges"])
        files["merges.txt"] = "\n".join(("#version: 0.2", *lines, "")).encode()
    if "vocab.txt" in files:
        named = {index: token for token, index in ids.items()}
        lines = [named.get(index, f"[unused-{index}]") for index in range(max(named, default=-1) + 1)]
        if any(set(token) & set("\r\n") for token in lines):
            del files["vocab.txt"]
        else:
            files["vocab.txt"] = "\n".join((*lines, "")).encode()
    if "added_tokens.json" in files:
        files["added_tokens.json"] = written({entry["content"]: entry["id"] for entry in data["added_tokens"]})
    config = parsed(files, "tokenizer_config.json", reference.where)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(entry["id"]): {key: entry.get(key, PLAIN[key]) for key in PLAIN} | {"content": entry["content"]}
            for entry in data["added_tokens"]
        }
        files["tokenizer_config.json"] = written(config)
    return Tokenizer(reference.where, data, files)
