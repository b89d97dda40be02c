"""Tokenizers as JSON: ids as they are on loading, unions of every kind, and texts cut by them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from weightsmith.errors import Error, FormatError
from weightsmith.merge._tokenizer import Tokenizer, check_alike, joined, read, trimmed

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(*tokens: tuple[str, int], **flags: bool) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": index, "content": token, **plain, **flags} for token, index in tokens]


def level(vocab: dict[str, int], entries: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return {"added_tokens": list(entries), "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}


def bpe(
    letters: Iterable[str],
    merges: Sequence[str | tuple[str, str]],
    entries: Sequence[dict[str, Any]] = (),
    spelling: Any = BYTES,
    glue: str | None = None,
    **model: Any,
) -> dict[str, Any]:
    """The letters, then what each merge makes."""
    vocab = {letter: index for index, letter in enumerate(letters)}
    written = []
    for merge in merges:
        left, right = merge.split() if isinstance(merge, str) else merge
        vocab.setdefault(left + right[len(glue or "") :], len(vocab))
        written.append(merge if isinstance(merge, str) else list(merge))
    found = {"type": "BPE", "vocab": vocab, "merges": written, "continuing_subword_prefix": glue, **model}
    return {"added_tokens": list(entries), "pre_tokenizer": spelling, "decoder": spelling, "model": found}


def unigram(pieces: Sequence[tuple[str, float]], entries: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"added_tokens": list(entries), "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [list(piece) for piece in pieces]}}  # fmt: skip


def pieces_of(vocab: dict[str, int], entries: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    model = {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100}  # fmt: skip
    return {"added_tokens": list(entries), "pre_tokenizer": {"type": "BertPreTokenizer"}, "model": model}


def of(data: dict[str, Any], where: str = "model 1", **files: bytes) -> Tokenizer:
    found = read(
        {"tokenizer.json": json.dumps(data).encode()} | {n.replace("__", "."): f for n, f in files.items()}, where
    )
    assert found is not None
    return found


def loaded(tokenizer: Tokenizer) -> Any:
    """By the package that will load it: and it must count as we do."""
    package = pytest.importorskip("tokenizers", reason='needs tokenizers: pip install "weightsmith[hf]"')
    made = package.Tokenizer.from_str(json.dumps(tokenizer.data))
    assert made.get_vocab(with_added_tokens=True) == tokenizer.ids
    for entry in tokenizer.added:
        assert made.token_to_id(entry["content"]) == entry.get("id", tokenizer.ids[entry["content"]])
    return made


WORDS = {"<unk>": 0, "a": 1, "b": 2}


@pytest.mark.parametrize(
    ("data", "ids"),
    [
        (level(WORDS, added(("<x>", 10), ("<y>", 12))), {"<x>": 3, "<y>": 4}),
        (level({"<unk>": 0, "a": 1, "b": 7}, added(("<x>", 3), ("<y>", 4))), {"<x>": 3, "<y>": 4}),
        (level(WORDS, added(("<y>", 4), ("<x>", 3))), {"<y>": 3, "<x>": 4}),
        (level(WORDS | {"<x>": 3}, added(("<x>", 5), ("<y>", 6))), {"<x>": 3, "<y>": 4}),
        (level({"<unk>": 0, "<x>": 9}, added(("<x>", 9), ("<y>", 3), ("<z>", 4))), {"<x>": 9, "<y>": 2, "<z>": 3}),
        (unigram([("<unk>", 0.0), ("a", -1.0)], added(("<x>", 5), ("<y>", 6))), {"<x>": 2, "<y>": 3}),
    ],
)
def test_ids_of_added_tokens_are_those_that_loading_gives(data, ids):
    tokenizer = of(data)
    assert {token: tokenizer.ids[token] for token in ids} == ids
    package = pytest.importorskip("tokenizers", reason='needs tokenizers: pip install "weightsmith[hf]"')
    assert package.Tokenizer.from_str(json.dumps(data)).get_vocab() == tokenizer.ids


def test_a_union_keeps_the_ids_of_the_first_and_adds_in_order():
    one = of(level(WORDS, added(("<s>", 3), ("<pad>", 4))))
    two = of(level({"<unk>": 0, "c": 1, "a": 2}, added(("<t>", 3), ("b", 4), special=False)), "model 2")
    union = joined(one, [two], ["<new>"])
    assert union.ids == {**WORDS, "<s>": 3, "<pad>": 4, "c": 5, "<t>": 6, "<new>": 7}
    assert [(e["content"], e["id"], e["special"]) for e in union.added] == [
        ("b", 2, False), ("<s>", 3, True), ("<pad>", 4, True), ("<t>", 6, False), ("<new>", 7, False),
    ]  # fmt: skip
    encoded = loaded(union).encode("c <t> a<s> b <pad>", add_special_tokens=False)
    assert encoded.tokens == ["c", "<t>", "a", "<s>", "b", "<pad>"]
    assert json.loads(union.files["tokenizer.json"]) == union.data
    assert joined(one, [one]) is one
    assert joined(one, [], ["a"]) is one


def test_holes_among_the_ids_do_not_give_one_id_twice():
    one = of(level({"<unk>": 0, "far": 9}, added(("<s>", 2))))
    two = of(level({"<unk>": 0, "c": 1, "d": 2, "e": 3}), "model 2")
    union = joined(one, [two])
    assert union.ids == {"<unk>": 0, "<s>": 2, "far": 9, "c": 10, "d": 11, "e": 12}
    loaded(union)


LETTERS = ["h", "e", "l", "o", "w", "r", "d", "\u0120"]


def test_merges_of_the_other_come_after_ones_own():
    one = of(bpe(LETTERS, ["h e", "l o"], added(("<s>", 10))))
    two = of(bpe(LETTERS, [("l", "o"), ("\u0120", "w"), ("\u0120w", "o"), ("h", "e"), ("he", "l")]), "model 2")
    union = joined(one, [two])
    assert union.model["merges"] == ["h e", "l o", "\u0120 w", "\u0120w o", "he l"]
    assert list(union.ids)[10:] == ["<s>", "\u0120w", "\u0120wo", "hel"]
    assert loaded(one).encode("hello world").tokens == ["he", "l", "lo", "\u0120", "w", "o", "r", "l", "d"]
    assert loaded(union).encode("hello world<s>").tokens == ["hel", "lo", "\u0120wo", "r", "l", "d", "<s>"]
    # The other keeps its pairs as lists, where a part may hold a space.
    assert joined(two, [one]).model["merges"][-1] == ["he", "l"]


def test_texts_are_cut_as_before_and_then_on():
    """Two tokenizers trained on different texts: nowhere does their union cut where the first did not."""
    package = pytest.importorskip("tokenizers", reason='needs tokenizers: pip install "weightsmith[hf]"')
    texts = ["the cat sat on the mat and the rat sat on the cat ", "def cat(mat): return rat(mat) + sat.cat(the) "]
    made = []
    for number, text in enumerate(texts):
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        alphabet = package.pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator([text * 20], package.trainers.BpeTrainer(
            vocab_size=300 + 5 * number, special_tokens=["<s>", f"<{number}>"], initial_alphabet=alphabet))  # fmt: skip
        made.append(of(json.loads(tokenizer.to_str()), f"model {number + 1}"))
    union = joined(made[0], made[1:])
    assert set(union.ids) == set(made[0].ids) | set(made[1].ids)
    assert made[0].ids.items() <= union.ids.items()
    first, both = loaded(made[0]), loaded(union)
    shorter = 0
    for text in [*texts, "a returning cat: def the(rat) <1> sat"]:
        cut, again = first.encode(text.replace("<1>", "")), both.encode(text.replace("<1>", ""))
        assert {start for start, _ in again.offsets} <= {start for start, _ in cut.offsets}
        shorter += len(again.ids) < len(cut.ids)
        assert both.decode(both.encode(text).ids, skip_special_tokens=False) == text
    assert shorter
    assert "<1>" in both.encode("a <1> b").tokens


def test_word_pieces():
    one = of(pieces_of({"[UNK]": 0, "play": 1, "##er": 2}, added(("[UNK]", 0))), vocab__txt=b"[UNK]\nplay\n##er\n")
    two = of(pieces_of({"[UNK]": 0, "##ing": 1, "run": 2}, added(("[UNK]", 0), ("[X]", 3))), "model 2")
    union = joined(one, [two])
    assert loaded(union).encode("playing runer [X]").tokens == ["play", "##ing", "run", "##er", "[X]"]
    assert union.files["vocab.txt"] == b"[UNK]\nplay\n##er\n##ing\nrun\n[X]\n"


def test_pieces_with_scores():
    one = of(unigram([("<unk>", 0.0), ("a", -2.0), ("b", -2.5), ("ab", -9.0)], added(("<s>", 4))))
    two = of(unigram([("<unk>", 0.0), ("b", -1.0), ("ba", -1.5), ("a", -2.0)], added(("<t>", 4))), "model 2")
    union = joined(one, [two])
    assert union.model["vocab"] == [
        ["<unk>", 0.0], ["a", -2.0], ["b", -2.5], ["ab", -9.0], ["<s>", -9.0], ["ba", -1.5], ["<t>", -9.0],
    ]  # fmt: skip
    assert loaded(union).encode("aba<s>bab<t>").tokens == ["a", "ba", "<s>", "ba", "b", "<t>"]


def test_what_other_files_add_is_known():
    """As transformers reads them: tokens that stand in its own files alone get the next ids."""
    config = {"added_tokens_decoder": {"4": {"content": "<late>", "special": True}, "0": {"content": "<unk>"}}}
    tokenizer = of(
        level(WORDS), added_tokens__json=b'{"<b>": 6, "a": 1}', tokenizer_config__json=json.dumps(config).encode()
    )
    assert tokenizer.ids == WORDS | {"<late>": 3, "<b>": 4}
    assert [entry["special"] for entry in tokenizer.added] == [True, False]
    loaded(tokenizer)


def test_tokens_without_a_row_are_trimmed():
    whole = of(
        bpe(LETTERS, ["h e", "he l", "l o", "hel lo"], added(("<s>", 12), ("<t>", 13))),
        merges__txt=b"",
        vocab__json=b"",
    )
    assert trimmed(whole, 14) is whole
    cut = trimmed(whole, 11)
    assert list(cut.ids) == [*LETTERS, "he", "hel", "lo"]
    assert cut.model["merges"] == ["h e", "he l", "l o"]
    assert cut.added == []
    assert loaded(cut).encode("hello").tokens == ["hel", "lo"]
    assert cut.files["merges.txt"] == b"#version: 0.2\nh e\nhe l\nl o\n"
    assert json.loads(cut.files["vocab.json"]) == cut.ids
    assert trimmed(whole, 9).model["merges"] == ["h e"]
    assert list(loaded(trimmed(whole, 13)).get_vocab(True)).count("<t>") == 0
    scored = of(unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], added(("<s>", 3))))
    assert trimmed(scored, 2).model["vocab"] == [["<unk>", 0.0], ["a", -1.0]]
    # An added token that stays keeps its id, although what was before it is gone.
    hole = of(level({"<unk>": 0, "x": 20, "y": 30}, added(("<s>", 3))))
    assert loaded(trimmed(hole, 10)).get_vocab(True) == {"<unk>": 0, "<s>": 3}


def test_what_a_merge_makes_counts_without_its_prefix():
    whole = of(bpe(["a", "##b"], [("a", "##b")], spelling={"type": "Whitespace"}, glue="##"))
    assert whole.ids == {"a": 0, "##b": 1, "ab": 2}
    assert trimmed(whole, 2).model["merges"] == []
    assert trimmed(whole, 3) is whole


def test_old_files_that_do_not_say_their_type():
    for data, kind in ((bpe("ab", []), "BPE"), (unigram([("a", 0.0)]), "Unigram"), (pieces_of({"a": 0}), "WordPiece"),
                       (level(WORDS), "WordLevel")):  # fmt: skip
        del data["model"]["type"]
        assert of(data).kind == kind


def test_unlike_tokenizers_are_told_apart():
    metaspace = {"type": "Metaspace", "replacement": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer = {"type": "Sequence", "normalizers": [replace]}
    as_llama = bpe("ab", []) | {"pre_tokenizer": None, "decoder": None, "normalizer": normalizer}
    nested = bpe("ab", [], spelling={"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTES]})
    check_alike(of(bpe("ab", [])), of(nested, "model 2"))
    check_alike(of(as_llama), of(bpe("ab", [], spelling=metaspace), "model 2"))
    for other, text in (
        (level(WORDS), "their type differs, 'BPE' against 'WordLevel'"),
        (as_llama, "their spelling of tokens differs, 'bytes"),
        (bpe("ab", [], glue="##"), "their continuing_subword_prefix differs, '' against '##'"),
        (bpe("ab", [], end_of_word_suffix="</w>"), "their end_of_word_suffix differs"),
    ):
        with pytest.raises(Error, match=f"model 1 and model 2 cannot be brought together: {text}"):
            check_alike(of(bpe("ab", [])), of(other, "model 2"))


def test_no_tokenizer_and_broken_ones():
    assert read({"config.json": b"{}", "tokenizer_config.json": b"{}"}, "model 1") is None
    for raw, text in (
        (b"{", "model 1: tokenizer.json is no JSON"),
        (b"[]", "tokenizer.json holds a list, not an object"),
        (b"{}", "tokenizer.json has no model with a vocab"),
        (b'{"model": {"type": "Syllables", "vocab": {}}}', "is of the type 'Syllables'; known: BPE, WordPiece"),
        (b'{"model": {"type": "BPE", "vocab": {"a": "b"}}}', "its tokens are not written as those of a BPE"),
        (b'{"model": {"type": "BPE", "vocab": []}}', "its tokens are not written as those of a BPE"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["abc"]}}', "its merges"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}}', "its merges"),
        (b'{"model": {"type": "Unigram", "vocab": {"a": 0}}}', "its tokens are not written as those of a Unigram"),
        (b'{"model": {"type": "Unigram", "vocab": [["a"]]}}', "its tokens are not written as those of a Unigram"),
        (b'{"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": [{}]}', "its tokens are not written"),
        (b"[" * 100_000, "tokenizer.json is no JSON"),
    ):
        with pytest.raises(FormatError, match=text):
            read({"tokenizer.json": raw}, "model 1")


# Without tokenizer.json


def test_slow_tokenizers_are_read_by_transformers(tmp_path):
    pytest.importorskip("transformers", reason='needs transformers: pip install "weightsmith[hf]"')
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing"]
    bert = read({"vocab.txt": "\n".join(words).encode(), "config.json": b'{"model_type": "bert"}'}, "model 1")
    assert bert is not None
    assert bert.kind == "WordPiece"
    assert list(bert.ids) == words
    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    gpt2 = read({"vocab.json": json.dumps(vocab).encode(), "merges.txt": b"#version: 0.2\na b\n",
                 "config.json": b'{"model_type": "gpt2"}'}, "model 1")  # fmt: skip
    assert gpt2 is not None
    assert gpt2.kind == "BPE"
    assert gpt2.ids == vocab
    assert gpt2.files.keys() == {"vocab.json", "merges.txt"}
    union = joined(gpt2, [of(bpe("abc", ["b c"]), "model 2")])
    assert json.loads(union.files["vocab.json"]) == vocab | {"c": 4, "bc": 5}
    assert union.files["merges.txt"] == b"#version: 0.2\na b\nb c\n"


def test_sentencepieces(tmp_path):
    pytest.importorskip("transformers", reason='needs transformers: pip install "weightsmith[hf]"')
    package = pytest.importorskip("sentencepiece", reason='needs sentencepiece: pip install "sentencepiece"')
    (tmp_path / "text").write_text("the cat sat on the mat\n" * 50)
    package.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "made"), vocab_size=20,
                                       model_type="bpe", minloglevel=2)  # fmt: skip
    files = {"tokenizer.model": (tmp_path / "made.model").read_bytes(), "config.json": b'{"model_type": "llama"}'}
    found = read(files, "model 1")
    assert found is not None
    spoken = package.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    assert {spoken.id_to_piece(index): index for index in range(20)}.items() <= found.ids.items()


def test_a_slow_tokenizer_that_cannot_be_read_is_named():
    pytest.importorskip("transformers", reason='needs transformers: pip install "weightsmith[hf]"')
    with pytest.raises(Error, match=r"model 1: transformers cannot make a tokenizer.json from tokenizer.model .*put"):
        read({"tokenizer.model": b"nonsense", "config.json": b'{"model_type": "llama"}'}, "model 1")
