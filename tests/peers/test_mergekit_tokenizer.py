"""The same rows for the same tokens as mergekit, when models of different vocabularies are merged.

The ids of new tokens are not compared: mergekit takes them in the order of a hash table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws

WHY = 'needs mergekit: pip install "weightsmith[peers]"'
mergekit = pytest.importorskip("mergekit.merge", reason=WHY, exc_type=ImportError)
config = pytest.importorskip("mergekit.config", reason=WHY, exc_type=ImportError)
options = pytest.importorskip("mergekit.options", reason=WHY, exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason=WHY)

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
LETTERS = ["<unk>", "a", "b", "c", "d", "e"]

# Vocabularies that overlap, in different order; "ab" and "cd" are made by merges.
VOCABULARIES: list[tuple[list[str], list[str], list[str]]] = [
    (LETTERS, ["a b", "d e"], ["<s>", "</s>"]),
    (["<unk>", "e", "d", "c", "b", "a"], ["c d", "d e", "cd e"], ["<s>", "<tool>", "</s>"]),
    (["<unk>", "b", "a", "c", "d", "e"], ["c d", "a b"], ["<pad>", "<s>"]),
]


def folder(place: Path, seed: int, padding: int = 0) -> list[str]:
    """A tiny Llama of one layer with a BPE tokenizer. Returns its tokens by id."""
    letters, merges, special = VOCABULARIES[seed]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), *special]
    torch.manual_seed(seed)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokens) + padding, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    network.save_pretrained(place)
    first = len(tokens) - len(special)
    added = [{"id": first + at, "content": token, "special": True, "normalized": False, "single_word": False,
              "lstrip": False, "rstrip": False} for at, token in enumerate(special)]  # fmt: skip
    vocab = {token: index for index, token in enumerate(tokens[:first])}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
                 "model": model}  # fmt: skip
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    return tokens


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for number in range(3):
        folder(tmp_path / f"m{number}", number, padding=3 * number)
    return [str(tmp_path / f"m{number}") for number in range(3)]


WEIGHTS = (0.5, 0.3, 0.2)


def theirs(
    folders: Sequence[str], out: Path, base: int | None, **tokenizer: Any
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Token -> id, and the merged tables."""
    said = {
        "merge_method": "linear",
        "models": [{"model": path, "parameters": {"weight": w}} for path, w in zip(folders, WEIGHTS, strict=False)],
        "dtype": "float32",
        "tokenizer": tokenizer,
    } | ({} if base is None else {"base_model": folders[base]})  # fmt: skip
    mergekit.run_merge(config.MergeConfiguration.model_validate(said), str(out), options.MergeOptions(quiet=True))
    made = ws.open(out)
    return transformers.AutoTokenizer.from_pretrained(out).get_vocab(), {name: made[name] for name in EMBEDDINGS}


def ours(
    folders: Sequence[str], out: Path, base: int | None, **choice: Any
) -> tuple[dict[str, int], dict[str, Tensor]]:
    made = ws.merge.share_vocabulary(folders, base=base, **choice)
    merged = ws.merge.mean(made, weight=WEIGHTS[: len(folders)])
    merged.save(out)
    network = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert network.config.vocab_size == merged.spec(EMBEDDINGS[0]).shape[0]
    return transformers.AutoTokenizer.from_pretrained(out).get_vocab(), {name: merged[name] for name in EMBEDDINGS}


def compare(
    folders: Sequence[str], tmp_path: Path, base: int | None, mine: Mapping[str, Any], other: Mapping[str, Any]
) -> set[str]:
    """Every token has one row in both; returns the tokens."""
    ids, tables = ours(folders, tmp_path / "ours", base, **mine)
    their_ids, their_tables = theirs(folders, tmp_path / "theirs", base, **other)
    assert ids.keys() == their_ids.keys()
    for name in EMBEDDINGS:
        assert tables[name].shape == their_tables[name].shape
        for token, index in ids.items():
            torch.testing.assert_close(tables[name][index], their_tables[name][their_ids[token]], msg=f"{name} {token}")
        count = len(ids)
        torch.testing.assert_close(tables[name][count:], their_tables[name][count:])
    return set(ids)


# Without a base mergekit takes the tokenizer of any model, by a hash that changes from run to run; ours is the first's.
SOURCES = [("base", base) for base in range(3)] + [
    (source, base) for source in ("union", 1, 2) for base in (None, 0, 1, 2)
]


@pytest.mark.parametrize(("source", "base"), SOURCES)
def test_sources(folders, tmp_path, source, base):
    named = folders[source] if isinstance(source, int) else source
    tokens = compare(folders, tmp_path, base, {"source": source}, {"source": named})
    if source == "union":
        assert tokens >= {"ab", "cd", "cde", "<tool>", "<pad>", "</s>"}


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_padding(folders, tmp_path, multiple):
    compare(folders, tmp_path, 0, {"pad_to_multiple_of": multiple}, {"source": "union", "pad_to_multiple_of": multiple})


KINDS = [(kind, token) for kind in ("model", "zero", "token", "token_id") for token in ("<tool>", "cd", "a")]
KINDS += [(kind, "<new>") for kind in ("zero", "token", "token_id")]  # and no model has it


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("kind", "token"), KINDS)
def test_overrides(folders, tmp_path, kind, token, force):
    wishes: dict[str, Any] = {
        "model": 1,
        "zero": {"kind": "zero"},
        "token": {"kind": "model_token", "model": 2, "token": "e"},
        "token_id": {"kind": "model_token", "model": 0, "token_id": 3},
    }
    source = wishes[kind]
    named = (
        folders[1] if kind == "model" else source | {"model": folders[source["model"]]} if "model" in source else source
    )
    tokens = compare(
        folders,
        tmp_path,
        0,
        {"tokens": {token: {"source": source, "force": force}}},
        {"source": "union", "tokens": {token: {"source": named, "force": force}}},
    )
    assert token in tokens


def test_two_models_of_which_the_base_knows_less(folders, tmp_path):
    compare(folders[:2], tmp_path, 0, {"source": "union"}, {"source": "union"})


def test_pieces_of_others_are_where_we_depart(folders, tmp_path):
    """Ours stay pieces, made by the other's merges; mergekit's cut any text that holds their letters."""
    compare(folders, tmp_path, 0, {}, {"source": "union"})
    mine = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    base = transformers.AutoTokenizer.from_pretrained(folders[0])
    assert base.tokenize("abcde") == ["ab", "c", "de"]
    assert mine.tokenize("abcde") == ["ab", "c", "de"]  # its own merges come first, and then none of the others fits
    assert other.tokenize("abcde") == ["ab", "cde"]
    assert mine.tokenize("cd") == ["cd"]
