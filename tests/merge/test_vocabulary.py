"""One vocabulary for several models: every row by a slow loop, the files beside them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge import share_vocabulary
from weightsmith.merge._rows import Rows
from weightsmith.weights import Held, Weights


def word_level(words: Sequence[str], added: Sequence[str] = ()) -> dict[str, Any]:
    """A ``tokenizer.json`` of whole words; added tokens get the ids after them."""
    vocab = {word: index for index, word in enumerate(words)}
    entries = [
        {"id": len(vocab) + at, "content": word, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for at, word in enumerate(added)
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    return {"version": "1.0", "added_tokens": entries, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}


def model(
    tokenizer: Mapping[str, Any] | None,
    rows: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    config: Mapping[str, Any] | None = None,
    **files: bytes,
) -> Weights:
    """Embedding, head with a bias, a bias of logits ``[1, rows]``, and something without a vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    embedding = drawn(rows, 4)
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.layers.0.mlp.weight": drawn(4, 4),
        "lm_head.weight": embedding if tied else drawn(rows, 4),
        "lm_head.bias": drawn(rows),
        "final_logits_bias": drawn(1, rows),
    }
    beside = {"config.json": json.dumps({"vocab_size": rows} | dict(config or {})).encode()}
    if tokenizer is not None:
        beside["tokenizer.json"] = json.dumps(tokenizer).encode()
    return Weights.of(tensors).with_files(beside | {name.replace("__", "."): data for name, data in files.items()})


def words_of(weights: Weights) -> dict[str, int]:
    """Token -> id in the tokenizer beside some weights, from its JSON alone."""
    data = json.loads(weights.files["tokenizer.json"])  # type: ignore[arg-type]
    vocab = data["model"]["vocab"]
    ids = {piece[0]: at for at, piece in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    for entry in data.get("added_tokens", []):
        assert ids.setdefault(entry["content"], entry["id"]) == entry["id"]
    return ids


NAMES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def by_hand(
    tables: Sequence[Tensor],
    ids: Sequence[Mapping[str, int]],
    place: int,
    shared: Mapping[str, int],
    base: int | None,
    tokens: Mapping[str, Mapping[str, Any]],
    count: int,
) -> Tensor:
    """The five rules, token after token, in float64."""
    out = torch.full((count, *tables[0].shape[1:]), float("nan"), dtype=torch.float64)
    for token, index in shared.items():
        wish = tokens.get(token, {})
        source = wish.get("source")
        knowing = [k for k in range(len(ids)) if token in ids[k]]
        if token in ids[place] and not wish.get("force"):
            row = tables[place][ids[place][token]]
        elif isinstance(source, int):
            row = tables[source][ids[source][token]]
        elif source is not None and source["kind"] == "zero":
            row = torch.zeros_like(tables[0][0])
        elif source is not None:
            at = source["token_id"] if "token_id" in source else ids[source["model"]][source["token"]]
            row = tables[source["model"]][at]
        elif len(knowing) == 1:
            row = tables[knowing[0]][ids[knowing[0]][token]]
        elif base is not None and token in ids[base]:
            row = tables[base][ids[base][token]]
        else:
            row = torch.stack([tables[k][ids[k][token]].double() for k in knowing]).mean(0)
        out[index] = row.double()
    known = sorted(set(shared.values()))
    vacant = [index for index in range(count) if index not in set(known)]
    out[vacant] = out[known].mean(0)
    return out


WORDS = ["a", "b", "c", "d", "e", "f"]
VOCABULARIES = st.lists(
    st.lists(st.sampled_from(WORDS), unique=True, min_size=1, max_size=6).map(lambda words: ["<unk>", *words]),
    min_size=1,
    max_size=4,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[str]], int | None, Any, dict[str, Any], int | None]:
    vocabularies = draw(VOCABULARIES)
    places = st.integers(0, len(vocabularies) - 1)
    base = draw(st.none() | places)
    source = draw(st.sampled_from(["union", "base"]) | places)
    tokens: dict[str, Any] = {}
    for word in draw(st.lists(st.sampled_from([*WORDS, "new", "re:.*"]), unique=True, max_size=3)):
        place = draw(places)
        other = {"kind": "model_token", "model": place}
        found: list[Any] = [{"kind": "zero"}, other | {"token": "<unk>"}]
        found += [other | {"token_id": len(vocabularies[place]) - 1}]
        found += [place] if word in vocabularies[place] else []
        found += [None] if any(word in words for words in vocabularies) else []
        tokens[word] = {"source": draw(st.sampled_from(found)), "force": draw(st.booleans())}
    return vocabularies, base, source, tokens, draw(st.sampled_from([None, 1, 4, 7]))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_every_row_by_the_loop(case):
    vocabularies, base, source, tokens, multiple = case
    models = [model(word_level(words), len(words), seed) for seed, words in enumerate(vocabularies)]
    made = share_vocabulary(models, base=base, source=source, tokens=tokens, pad_to_multiple_of=multiple)
    ids = [{word: index for index, word in enumerate(words)} for words in vocabularies]
    shared = words_of(made[0])
    reference = ids[source] if isinstance(source, int) else ids[base or 0]
    expected = set(reference) | set(tokens)
    if source == "union":
        expected |= {word for words in vocabularies for word in words}
    assert set(shared) == expected
    assert reference.items() <= shared.items()  # the reference keeps its ids
    assert sorted(shared.values()) == list(range(len(shared)))
    count = -(-len(shared) // (multiple or 1)) * (multiple or 1)
    for place, weights in enumerate(made):
        assert words_of(weights) == shared
        assert json.loads(weights.files["config.json"])["vocab_size"] == count
        for name in NAMES:
            tables = [one[name] for one in models]
            loop = by_hand(tables, ids, place, shared, base, tokens, count)
            torch.testing.assert_close(weights[name].double(), loop, rtol=1e-6, atol=1e-6)
        tables = [one["final_logits_bias"].T for one in models]
        loop = by_hand(tables, ids, place, shared, base, tokens, count)
        torch.testing.assert_close(weights["final_logits_bias"].T.double(), loop, rtol=1e-6, atol=1e-6)
        assert torch.equal(weights["model.layers.0.mlp.weight"], models[place]["model.layers.0.mlp.weight"])


@pytest.mark.usefixtures("small_pieces")
def test_saved_in_small_pieces_and_merged(tmp_path, monkeypatch):
    """Many rows, in runs and one by one: the mean of the saved models is the mean of the dense tables."""
    monkeypatch.setattr(Rows, "BLOCK", 8)
    vocabularies = [[f"w{i}" for i in range(60)], [f"w{i}" for i in range(75, 25, -1)], ["w7", "x", "w70", "w0"]]
    models = [model(word_level(words), len(words), seed) for seed, words in enumerate(vocabularies)]
    made = share_vocabulary(models, pad_to_multiple_of=8)
    merged = ws.merge.mean(made)
    ws.merge.mean(made).save(tmp_path / "one", threads=1)
    ws.merge.mean(made).save(tmp_path / "four", threads=4)
    written = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "four" / "model.safetensors").read_bytes()
    ids = [{word: index for index, word in enumerate(words)} for words in vocabularies]
    shared = words_of(made[0])
    assert list(shared) == [*vocabularies[0], *(f"w{i}" for i in range(75, 59, -1)), "x"]
    opened = ws.open(tmp_path / "one")
    for name in NAMES:
        tables = [one[name] for one in models]
        loop = sum(by_hand(tables, ids, place, shared, None, {}, 80) for place in range(3)) / 3
        torch.testing.assert_close(opened[name].double(), loop, rtol=1e-5, atol=1e-6)
        assert torch.equal(opened[name], merged[name])


def test_the_worked_example():
    """Two vocabularies in different order, with an added token on both sides."""
    one = model(word_level(["<unk>", "cat", "dog"], ["<s>"]), 4, 0)
    two = model(word_level(["<unk>", "bird", "dog", "cat"], ["<s>", "<tool>"]), 6, 1)
    first, second = share_vocabulary([one, two], base=0)
    assert words_of(first) == {"<unk>": 0, "cat": 1, "dog": 2, "<s>": 3, "bird": 4, "<tool>": 5}
    a, b = one["lm_head.weight"], two["lm_head.weight"]
    assert torch.equal(first["lm_head.weight"], torch.cat([a, b[[1, 5]]]))
    assert torch.equal(second["lm_head.weight"], b[[0, 3, 2, 4, 1, 5]])
    added = {entry["content"]: entry for entry in json.loads(first.files["tokenizer.json"])["added_tokens"]}
    assert {token: entry["id"] for token, entry in added.items()} == {"<s>": 3, "<tool>": 5}
    assert added["<tool>"]["special"] is True


def test_the_order_of_models_decides_who_is_added_first_and_the_base_comes_before_all():
    vocabularies = [["<unk>", "a"], ["<unk>", "b"], ["<unk>", "c"]]
    models = [model(word_level(words), 2, seed) for seed, words in enumerate(vocabularies)]
    assert list(words_of(share_vocabulary(models)[0])) == ["<unk>", "a", "b", "c"]
    assert list(words_of(share_vocabulary(models, base=2)[0])) == ["<unk>", "c", "a", "b"]


def test_without_a_base_those_who_know_a_token_are_averaged():
    vocabularies = [["<unk>", "a"], ["<unk>", "a"], ["<unk>"]]
    models = [model(word_level(words), len(words), seed) for seed, words in enumerate(vocabularies)]
    tables = [one["lm_head.weight"] for one in models]
    assert torch.equal(share_vocabulary(models)[2]["lm_head.weight"][1], (tables[0][1] + tables[1][1]) / 2)
    assert torch.equal(share_vocabulary(models, base=1)[2]["lm_head.weight"][1], tables[1][1])
    assert torch.equal(share_vocabulary(models, base=2)[2]["lm_head.weight"][1], (tables[0][1] + tables[1][1]) / 2)


def test_force_gives_the_row_to_those_who_have_their_own():
    models = [model(word_level(["<unk>", "a"]), 2, seed) for seed in range(2)]
    own = [one["lm_head.weight"][1] for one in models]
    plain = share_vocabulary(models, tokens={"a": {"source": 1}})
    assert [torch.equal(one["lm_head.weight"][1], own[k]) for k, one in enumerate(plain)] == [True, True]
    forced = share_vocabulary(models, tokens={"a": {"source": 1, "force": True}})
    assert [torch.equal(one["lm_head.weight"][1], own[1]) for one in forced] == [True, True]
    averaged = share_vocabulary(models, tokens={"a": {"force": True}})
    assert [torch.equal(one["lm_head.weight"][1], (own[0] + own[1]) / 2) for one in averaged] == [True, True]


def test_a_new_token_stands_for_what_it_is_told_to():
    """Its name is a word, not a pattern."""
    models = [model(word_level(["<unk>", "a"]), 2, seed) for seed in range(2)]
    like_a = {"source": {"kind": "model_token", "model": 1, "token": "a"}}
    made = share_vocabulary(models, tokens={"re:.*": like_a, "*": {"source": {"kind": "zero"}}})
    assert words_of(made[0]) == {"<unk>": 0, "a": 1, "re:.*": 2, "*": 3}
    for place, one in enumerate(made):
        assert torch.equal(one["lm_head.weight"][:2], models[place]["lm_head.weight"])
        assert torch.equal(one["lm_head.weight"][2], models[1]["lm_head.weight"][1])
        assert one["lm_head.bias"][3] == 0


def test_tied_tensors_stay_tied():
    models = [model(word_level(words), 3, seed, tied=True)
              for seed, words in enumerate((["<unk>", "a", "b"], ["<unk>", "b", "c"]))]  # fmt: skip
    for one in share_vocabulary(models, pad_to_multiple_of=8):
        assert one.ties == {"lm_head.weight": "model.embed_tokens.weight"}
        assert one.node("lm_head.weight") is one.node("model.embed_tokens.weight")


def test_what_is_tied_in_one_alone_takes_each_tensors_own_rows():
    one = model(word_level(["<unk>", "a"]), 2, 0, tied=True)
    two = model(word_level(["<unk>", "b"]), 2, 1)
    first, second = share_vocabulary([one, two])
    assert torch.equal(first["lm_head.weight"][2], two["lm_head.weight"][1])
    assert torch.equal(first["model.embed_tokens.weight"][2], two["model.embed_tokens.weight"][1])
    assert not second.ties
    # with nothing to take from the other it stays as it was
    assert share_vocabulary([one, two], source=0)[0].ties == one.ties


def test_half_precision_is_copied_bit_by_bit_and_means_are_rounded_once():
    vocabularies = [["<unk>", "a"], ["a", "<unk>"], ["<unk>"]]
    models = [model(word_level(words), len(words), seed, torch.bfloat16) for seed, words in enumerate(vocabularies)]
    made = share_vocabulary(models)
    tables = [one["lm_head.weight"] for one in models]
    assert made[2].spec("lm_head.weight").dtype == torch.bfloat16
    assert torch.equal(made[1]["lm_head.weight"], tables[1][[1, 0]])
    mean = (tables[0][1].float() + tables[1][0].float()) / 2
    assert torch.equal(made[2]["lm_head.weight"][1], mean.to(torch.bfloat16))
    merged = ws.merge.mean(made)["lm_head.weight"][1]  # the mean goes on unrounded
    expected = (tables[0][1].float() + tables[1][0].float() + mean) / 3
    torch.testing.assert_close(merged, expected.to(torch.bfloat16), rtol=0, atol=0)


def test_each_model_keeps_its_dtype():
    one, two = model(word_level(["<unk>", "a"]), 2, 0, torch.bfloat16), model(word_level(["<unk>", "b"]), 2, 1)
    first, second = share_vocabulary([one, two])
    assert (first.spec("lm_head.weight").dtype, second.spec("lm_head.weight").dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(first["lm_head.weight"][2], two["lm_head.weight"][1].to(torch.bfloat16))
    assert torch.equal(second["lm_head.weight"][1 + 1], two["lm_head.weight"][1])


def test_padded_embeddings_lose_their_padding_and_get_what_is_asked_for():
    one, two = model(word_level(["<unk>", "a"]), 16, 0), model(word_level(["a", "<unk>"]), 8, 1)
    first, second = share_vocabulary([one, two])
    assert first["lm_head.weight"].shape == second["lm_head.weight"].shape == (2, 4)
    assert torch.equal(second["lm_head.weight"], two["lm_head.weight"][[1, 0]])
    padded = share_vocabulary([one, two], pad_to_multiple_of=4)[1]["lm_head.weight"]
    assert padded.shape == (4, 4)
    torch.testing.assert_close(padded[2:], two["lm_head.weight"][:2].mean(0).expand(2, 4))


def test_tokens_beyond_the_embedding_are_not_known():
    """Their rows do not exist: the token is gone, unless another model has it."""
    one = model(word_level(["<unk>", "a", "b"], ["<x>", "<y>"]), 3, 0)
    two = model(word_level(["<unk>", "a"], ["<y>"]), 3, 1)
    first, _ = share_vocabulary([one, two])
    assert words_of(first) == {"<unk>": 0, "a": 1, "b": 2, "<y>": 3}
    assert torch.equal(first["lm_head.weight"][3], two["lm_head.weight"][2])


def test_ids_that_no_token_has_are_padding():
    data = word_level(["<unk>", "a"])
    data["model"]["vocab"]["far"] = 4
    one, two = model(data, 6, 0), model(word_level(["<unk>", "b"]), 2, 1)
    first, second = share_vocabulary([one, two])
    assert words_of(first) == {"<unk>": 0, "a": 1, "far": 4, "b": 5}
    for weights, own in ((first, one), (second, two)):
        table = weights["lm_head.weight"]
        assert table.shape == (6, 4)
        torch.testing.assert_close(table[2:4], table[[0, 1, 4, 5]].mean(0).expand(2, 4))
        assert torch.equal(table[0], own["lm_head.weight"][0])


def test_equal_vocabularies_are_left_alone():
    models = [model(word_level(["<unk>", "a"]), 2, seed) for seed in range(2)]
    for before, after in zip(models, share_vocabulary(models), strict=True):
        assert all(before.node(name) is after.node(name) for name in before)
        assert after.files == before.files
        assert after.lineage.method == "merge.share_vocabulary"


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases():
    one, two = model(word_level(["<unk>", "a"]), 2, 0), model(None, 2, 1)
    three = model(word_level(["a", "<unk>"]), 2, 2)
    made = share_vocabulary([three, two, one], base=2)
    assert torch.equal(made[1]["lm_head.weight"], two["lm_head.weight"])
    assert torch.equal(made[0]["lm_head.weight"], three["lm_head.weight"][[1, 0]])
    assert words_of(made[1]) == words_of(one)
    with pytest.raises(Error, match=r"model 2 has no tokenizer.*with 3 rows .* model 1 \(2 rows\)"):
        share_vocabulary([one, model(None, 3, 1)])
    with pytest.raises(Error, match="model 2 has no tokenizer beside its weights"):
        share_vocabulary([one, two], base=1)


# Files


def test_the_configuration_follows_its_tokens():
    config = {"bos_token_id": 2, "eos_token_id": [3, 1], "pad_token_id": None, "hidden_size": 2,
              "text_config": {"vocab_size": 4, "unk_token_id": 0, "image_token_index": 3}}  # fmt: skip
    one = model(word_level(["<unk>", "x"]), 2, 0)
    two = model(word_level(["<unk>", "y"], ["<s>", "</s>"]), 4, 1, config=config,
                generation_config__json=b'{"eos_token_id": 3, "suppress_tokens": [1, 2], "max_length": 2}')  # fmt: skip
    second = share_vocabulary([one, two])[1]
    assert words_of(second) == {"<unk>": 0, "x": 1, "y": 2, "<s>": 3, "</s>": 4}
    assert json.loads(second.files["config.json"]) == {
        "vocab_size": 5, "bos_token_id": 3, "eos_token_id": [4, 2], "pad_token_id": None, "hidden_size": 2,
        "text_config": {"vocab_size": 5, "unk_token_id": 0, "image_token_index": 4},
    }  # fmt: skip
    generation = json.loads(second.files["generation_config.json"])
    assert generation == {"eos_token_id": 4, "suppress_tokens": [2, 3], "max_length": 2}


def test_ids_of_tokens_that_are_gone_are_those_of_the_tokenizers_donor():
    one = model(word_level(["<unk>", "x", "</s>"]), 3, 0, config={"eos_token_id": 2})
    two = model(word_level(["<unk>", "<end>"]), 2, 1, config={"eos_token_id": 1, "pad_token_id": 1})
    config = json.loads(share_vocabulary([one, two], source="base")[1].files["config.json"])
    assert config == {"vocab_size": 3, "eos_token_id": 2, "pad_token_id": None}


def test_all_models_get_the_files_of_one_tokenizer():
    settings_of = b'{"added_tokens_decoder": {"2": {"content": "<s>"}}, "bos_token": "<s>", "chat_template": "{{ 1 }}"}'
    one = model(word_level(["<unk>", "a"], ["<s>"]), 3, 0, tokenizer_config__json=settings_of,
                special_tokens_map__json=b'{"bos_token": "<s>"}', added_tokens__json=b'{"<s>": 2}',
                vocab__json=b"{}", tokenizer__model=b"pieces", LICENSE=b"one")  # fmt: skip
    two = model(word_level(["<unk>", "b"]), 2, 1, LICENSE=b"two", vocab__txt=b"stale")
    first, second = share_vocabulary([one, two])
    mine = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
    assert set(first.files) == set(second.files) == mine | {"config.json", "LICENSE"}
    assert all(first.files[name] == second.files[name] for name in mine)
    assert (first.files["LICENSE"], second.files["LICENSE"]) == (b"one", b"two")
    said = json.loads(second.files["tokenizer_config.json"])
    assert (said["bos_token"], said["chat_template"]) == ("<s>", "{{ 1 }}")
    assert said["added_tokens_decoder"]["2"]["content"] == "<s>"
    assert json.loads(first.files["vocab.json"]) == {"<unk>": 0, "a": 1, "<s>": 2, "b": 3}
    assert json.loads(first.files["added_tokens.json"]) == {"<s>": 2}
    # what need not change is handed on as it is
    base = share_vocabulary([one, two], source="base")[1]
    assert (base.files["tokenizer.model"], base.files["vocab.json"]) == (b"pieces", b"{}")


def test_models_from_folders(tmp_path):
    for number, words in enumerate((["<unk>", "a"], ["<unk>", "b"])):
        model(word_level(words), 2, number).save(tmp_path / str(number))
    first, _ = share_vocabulary([tmp_path / "0", str(tmp_path / "1")])
    first.save(tmp_path / "out")
    opened = ws.open(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 3
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"] == words_of(first)
    assert opened["lm_head.weight"].shape == (3, 4)
    assert "share_vocabulary(model=0" in str(opened.lineage)


def test_without_a_configuration_the_first_embedding_says_how_many_rows():
    made = []
    for seed, words in enumerate((["<unk>", "a"], ["<unk>", "b"])):
        whole = model(word_level(words), 2, seed)
        made.append(Weights({n: whole.node(n) for n in whole}, files={"tokenizer.json": whole.files["tokenizer.json"]}))
    first, second = share_vocabulary(made)
    assert first["lm_head.weight"].shape == second["model.embed_tokens.weight"].shape == (3, 4)


def test_tensors_of_other_names_are_declared():
    def odd(seed: int, words: list[str]) -> Weights:
        table = torch.randn(len(words), 3, generator=torch.Generator().manual_seed(seed))
        whole = model(word_level(words), len(words), seed)
        return Weights.of({"tokens/table": table}).with_files(whole.files)

    models = [odd(0, ["<unk>", "a"]), odd(1, ["<unk>", "b"])]
    with pytest.raises(Error, match=r"no tensor of model 1 is named as an embedding.*tensors="):
        share_vocabulary(models)
    assert share_vocabulary(models, tensors="tokens/*")[0]["tokens/table"].shape == (3, 3)


# Refusals


def test_what_is_refused():
    one, two = model(word_level(["<unk>", "a"]), 2, 0), model(word_level(["<unk>", "b"]), 2, 1)

    def refuse(text: str, models: Sequence[Weights] = (one, two), **options: Any) -> None:
        with pytest.raises(Error, match=text):
            share_vocabulary(models, **options)

    refuse("at least 1 model", [])
    refuse("base is the place of one of the 2 models from 0 on, got 2", base=2)
    refuse(r"source is 'union', 'base' or the place of a model, got 'unions' \(did you mean 'union'", source="unions")
    refuse("source is the place of one of the 2 models from 0 on, got -1", source=-1)
    refuse("pad_to_multiple_of must be at least 1, got 0", pad_to_multiple_of=0)
    refuse("tokens\\['a'\\] is .* got 3", tokens={"a": 3})
    refuse("tokens\\['a'\\] is .* got .*'sorce'", tokens={"a": {"sorce": 1}})
    refuse("no model has a row for the token 'new'", tokens={"new": {}})
    refuse("source: model 2 has no token 'a'", tokens={"a": {"source": 1}})
    refuse("source is the place of one of the 2 models from 0 on, got 7", tokens={"a": {"source": 7}})
    both = {"kind": "model_token", "model": 0, "token": "a", "token_id": 1}
    for wrong in ({"kind": "one"}, {"kind": "model_token", "model": 0}, both, {"kind": "zero", "model": 0}):
        refuse("with either 'token' or 'token_id'", tokens={"a": {"source": wrong}})
    refuse("model is the place", tokens={"a": {"source": {"kind": "model_token", "model": "x", "token": "a"}}})
    refuse("has no token 'zzz'", tokens={"a": {"source": {"kind": "model_token", "model": 0, "token": "zzz"}}})
    refuse("has rows 0 to 1, and none 2", tokens={"a": {"source": {"kind": "model_token", "model": 0, "token_id": 2}}})
    refuse("model 1 has no tokenizer", [model(None, 2, 0), two])
    refuse(
        "vocab_size 3, but there is .*embed_tokens.weight",
        [one, model(word_level(["b"]), 2, 1, config={"vocab_size": 3})],
    )
    refuse("must have the same tensors: the second lacks lm_head.bias", [one, two.drop("lm_head.bias")])
    broken = two | {"lm_head.weight": torch.zeros(2, 5)}
    refuse(r"differ in more than their vocabulary: lm_head.weight is \[2, 4\] and \[2, 5\]", [one, broken])
    other = two | {"model.layers.0.mlp.weight": torch.zeros(4, 5)}
    refuse("differ in more than their vocabulary: model.layers.0.mlp.weight", [one, other])
    small = two | {"lm_head.bias": torch.zeros(3)}
    refuse(
        "lm_head.bias has an axis of the vocabulary in some models and not in others",
        [model(word_level("abc"), 3, 0), small],
    )
    refuse("lm_head.bias of model 2 is int64", [one, two | {"lm_head.bias": torch.zeros(2, dtype=torch.int64)}])
    pieces = {"model": {"type": "WordPiece", "vocab": {"<unk>": 0, "b": 1}, "unk_token": "<unk>"}}
    refuse("model 1 and model 2 cannot be brought together: their type differs, 'WordLevel' against 'WordPiece'",
           [one, model(pieces, 2, 1)])  # fmt: skip


def test_nothing_is_read_before_it_is_asked_for():
    one, two = model(word_level(["<unk>", "a"]), 2, 0), model(word_level(["<unk>", "b"]), 2, 1)
    meta = Weights({name: Held(torch.empty(one.spec(name).shape, device="meta")) for name in one}).with_files(one.files)
    made = share_vocabulary([meta, two])
    assert made[1].spec("lm_head.weight").shape == (3, 4)
    with pytest.raises(Error, match=r"tensor lm_head\.weight: is on the meta device"):
        made[1]["lm_head.weight"]


# With transformers


def saved_llama(folder: Path, words: Sequence[str], special: Sequence[str], seed: int, tied: bool = False) -> Any:
    """A tiny Llama with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "weightsmith[hf]"')
    torch.manual_seed(seed)
    data = word_level(words, special)
    config = transformers.LlamaConfig(
        vocab_size=len(words) + len(special), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=len(words),
        eos_token_id=len(words) + special.index("</s>"), pad_token_id=None,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return network


@pytest.mark.parametrize("tied", [False, True])
def test_two_llamas_become_one(tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "weightsmith[hf]"')
    one = saved_llama(tmp_path / "one", ["<unk>", "the", "cat", "sat"], ["<s>", "</s>"], 0, tied)
    two = saved_llama(tmp_path / "two", ["<unk>", "sat", "dog", "the"], ["<s>", "<tool>", "</s>"], 1, tied)
    made = share_vocabulary([tmp_path / "one", tmp_path / "two"], base=0)
    for number, shared in enumerate(made):
        shared.save(tmp_path / f"shared{number}")
    ws.merge.mean(made).save(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "the dog sat <tool> </s>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == text.split()
    # Both models say of a text in their own words what they said before, at the ids of their own tokens.
    for network, folder, sentence in ((one, "one", "the cat sat <s>"), (two, "two", "the dog sat <tool>")):
        place = 0 if folder == "one" else 1
        old = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"shared{place}")
        assert new.config.vocab_size == len(tokenizer) == 8
        assert new.config.eos_token_id == tokenizer.convert_tokens_to_ids("</s>")
        before = old(sentence, return_tensors="pt", add_special_tokens=False)["input_ids"]
        after = tokenizer(sentence, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits, moved = network(before).logits, new(after).logits
        places = [
            tokenizer.convert_tokens_to_ids(old.convert_ids_to_tokens(i)) for i in range(network.config.vocab_size)
        ]
        torch.testing.assert_close(moved[..., places], logits)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    assert merged.config.tie_word_embeddings == tied
