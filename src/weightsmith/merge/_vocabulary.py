"""One vocabulary for several models, so that models with different tokenizers can be merged.

Row 17 of two embeddings may stand for two words. Before their mean means anything, every model must
have the same tokens at the same rows: its own row where it knows the token, and where it does not,
what those say that do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.errors import Error, did_you_mean, listed
from weightsmith.merge._rows import Order, Rows, Term, mean_slice
from weightsmith.merge._tokenizer import FILES, Tokenizer, check_alike, joined, parsed, read, trimmed, written
from weightsmith.merge.room import Source, opened_models
from weightsmith.weights import Lazy, Pattern, Weights, dtype_name, matches, same_names

EMBEDDINGS = (
    r"re:(^|\.)(embed_tokens|embed_in|embed_out|embeddings?|word_embeddings?|token_embd|token_embedding|"
    r"tok_embeddings|wte|shared|head|lm_head|lm_loss|generator_lm_head|output|output_layer|proj_out|ff_out|decoder|"
    r"predictions|vocab_projector|pred_layer\.proj|final_logits_bias)(\.weight|\.bias)?$"
)
"""Embeddings and heads by the names that models give them."""

_IDS = re.compile(r"(_token_ids?|_token_index|suppress_tokens)$")
"""Entries of a configuration that hold ids of tokens."""

_INSIDE = ("text_config", "llm_config", "language_config", "decoder")
"""Where a configuration may keep that of its language model."""


@dataclass(frozen=True, eq=False)
class _Member:
    """A model, its tokens, and the tensors that have a row for each of them."""

    where: str
    weights: Weights
    config: Mapping[str, Any]
    tokenizer: Tokenizer
    rows: int
    axes: Mapping[str, int]
    """Tensor -> its axis of the vocabulary."""


def share_vocabulary(
    models: Sequence[Source],
    *,
    base: int | None = None,
    source: Literal["union", "base"] | int = "union",
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to_multiple_of: int | None = None,
    tensors: Pattern = EMBEDDINGS,
) -> list[Weights]:
    """The same models over one vocabulary, ready for every merging method.

    Row of a token in a model, by the first rule that applies:

    1. its own, if the model knows the token;
    2. what ``tokens`` says of it;
    3. that of the only model that knows it;
    4. that of the base, if it knows it;
    5. the mean over the models that know it.

    Rows beyond the last token, and those of ids that no token has, are the model's mean over its tokens. A
    model whose tokenizer has tokens beyond its embedding does not know them.

    Args:
        models: models of one architecture, each with its tokenizer beside it; with the base among them where a
            method needs one. One without a tokenizer is taken to have that of the base (the first model), if it
            has as many rows.
        base: the place in ``models`` of the base. Its tokenizer is the one that others are added to; without a
            base that of the first model is, and rule 4 is left out.
        source: whose tokens the result has: ``"union"``, ``"base"`` alone, or those of one model.
        tokens: ``{token: {"source": ..., "force": ...}}``. A source is the place of a model, ``{"kind": "zero"}``,
            or ``{"kind": "model_token", "model": place}`` with the ``"token"`` or ``"token_id"`` to copy. With
            ``force``, models that know the token get that row as well. Tokens that are nowhere yet are added.
        pad_to_multiple_of: round the number of rows up to a multiple of this.
        tensors: pattern of the tensors that may have an axis of the vocabulary. Those do of which an axis is as
            long as ``vocab_size`` in ``config.json`` (without one: as the first axis of the first that fits).

    Returns:
        list[Weights]: lazy, in the order given, of the same dtypes. Tensors tied in all models stay tied. ``files``
        hold the shared tokenizer, and a ``config.json`` whose ``vocab_size`` and token ids follow it. A union keeps
        the ids of the base; tokens of the others follow, in the order of models and ids. Rows that no token has
        are dropped, so that the result may be shorter than a padded embedding was.

    Raises:
        Error: a model has no tokenizer, tokenizers are of different types or spell tokens differently, models
            differ in more than their vocabulary, or ``tokens`` asks for what is not there.

    Computed in float32 or wider. Padding with the mean: Hewitt 2021, 'Initializing New Word Embeddings for
    Pretrained Language Models'.

    >>> def model(rows, *words):
    ...     level = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": words[0]}
    ...     tokenizer = json.dumps({"model": level, "added_tokens": []}).encode()
    ...     return Weights.of({"wte.weight": torch.tensor(rows)}).with_files({"tokenizer.json": tokenizer})
    >>> import json
    >>> a = model([[0.0], [1.0]], "?", "cat")
    >>> b = model([[2.0], [5.0], [9.0]], "?", "dog", "cat")
    >>> [w["wte.weight"].flatten().tolist() for w in share_vocabulary([a, b])]    # ?, cat, dog
    [[0.0, 1.0, 5.0], [2.0, 9.0, 5.0]]
    """
    opened = opened_models(models, "share_vocabulary")
    count = len(opened)
    if base is not None:
        _checked_place(base, count, "base")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise Error(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
    for number, other in enumerate(opened[1:], 2):
        same_names(opened[0], other, f"share_vocabulary: model 1 and model {number} must have the same tensors")
    first = base or 0
    members = _members(opened, first, tensors)
    _check_shapes(members)
    shared = _shared(members, first, source, tokens or {})
    fills = _Fills(members, base, tokens or {})
    padded = max(shared.ids.values(), default=-1) + 1
    padded += -padded % (pad_to_multiple_of or 1)
    options = {"base": base, "source": source, "tokens": tokens, "pad_to_multiple_of": pad_to_multiple_of}
    donor = members[source if isinstance(source, int) else first]
    return [
        _over(members, place, fills.terms(place, shared.ids, padded), shared, donor, options) for place in range(count)
    ]


# The models


def _members(opened: Sequence[Weights], first: int, tensors: Pattern) -> list[_Member]:
    told = [f"model {number}" for number in range(1, len(opened) + 1)]
    sized = [_sized(weights, where, tensors) for weights, where in zip(opened, told, strict=True)]
    read_in: list[Tokenizer | None] = []
    for place, weights in enumerate(opened):
        same = next((k for k in range(place) if _same_files(opened[k].files, weights.files)), None)
        read_in.append(read(weights.files, told[place]) if same is None else read_in[same])
    reference = read_in[first]
    if reference is None:
        raise Error(f"share_vocabulary: {told[first]} has no tokenizer beside its weights ({listed(FILES, 2)})")
    axes = _axes(opened, [rows for _, rows, _ in sized], sized[0][2])
    members = []
    for place, (weights, (config, rows, _)) in enumerate(zip(opened, sized, strict=True)):
        tokenizer = read_in[place] or reference
        if read_in[place] is None and rows != sized[first][1]:
            raise Error(
                f"share_vocabulary: {told[place]} has no tokenizer beside its weights, and with {rows} rows "
                f"its vocabulary cannot be that of {told[first]} ({sized[first][1]} rows)"
            )
        check_alike(reference, tokenizer)
        members.append(_Member(told[place], weights, config, trimmed(tokenizer, rows), rows, axes))
    return members


def _same_files(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two models share a tokenizer in memory, so that it need not be read twice."""
    return "tokenizer.json" in one and all(one.get(name) is two.get(name) for name in FILES)


def _sized(weights: Weights, where: str, tensors: Pattern) -> tuple[dict[str, Any], int, list[str]]:
    """The configuration, the number of rows, and the tensors that may have them."""
    config = parsed(weights.files, "config.json", f"share_vocabulary: {where}")
    fitting = [name for name in weights if matches(tensors, name) and weights.spec(name).shape]
    if not fitting:
        raise Error(f"share_vocabulary: no tensor of {where} is named as an embedding; say which with tensors=")
    rows = _vocab_size(config) or weights.spec(fitting[0]).shape[0]
    if not any(rows in weights.spec(name).shape for name in fitting):
        shown = (f"{name} {list(weights.spec(name).shape)}" for name in fitting)
        raise Error(f"share_vocabulary: config.json of {where} has vocab_size {rows}, but there is {listed(shown)}")
    return config, rows, fitting


def _axes(opened: Sequence[Weights], rows: Sequence[int], fitting: Sequence[str]) -> dict[str, int]:
    """Tensor -> the first axis that is as long as the vocabulary in every model."""
    axes = {}
    for name in fitting:
        shapes = [weights.spec(name).shape for weights in opened]
        sized = list(zip(shapes, rows, strict=True))
        has = [[axis for axis, length in enumerate(shape) if length == size] for shape, size in sized]
        common = sorted(set.intersection(*map(set, has)))
        if common:
            axes[name] = common[0]
        elif any(has) and len(set(rows)) > 1:
            lengths = ", ".join(f"{list(shape)} of {size}" for shape, size in sized)
            raise Error(
                f"share_vocabulary: {name} has an axis of the vocabulary in some models and not in others (shape of "
                f"vocab_size: {lengths}); see tensors="
            )
    for name in axes:
        for number, weights in enumerate(opened, 1):
            dtype = weights.spec(name).dtype
            if not dtype.is_floating_point:
                raise Error(f"share_vocabulary: {name} of model {number} is {dtype_name(dtype)}; make it floats first")
    return axes


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    places = (config, *(config.get(name) for name in _INSIDE))
    sizes = (place.get("vocab_size") for place in places if isinstance(place, Mapping))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _check_shapes(members: Sequence[_Member]) -> None:
    """Alike but for the length of the vocabulary."""
    first = members[0]
    for other in members[1:]:
        for name in first.weights:
            shapes = one, two = [list(member.weights.spec(name).shape) for member in (first, other)]
            axis = first.axes.get(name, -1)
            if len(one) != len(two) or any(one[at] != two[at] for at in range(len(one)) if at != axis):
                raise Error(
                    f"share_vocabulary: {first.where} and {other.where} differ in more than their vocabulary: "
                    f"{name} is {shapes[0]} and {shapes[1]}"
                )


def _checked_place(place: Any, count: int, option: str) -> int:
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < count:
        raise Error(f"share_vocabulary: {option} is the place of one of the {count} models from 0 on, got {place!r}")
    return place


# The vocabulary


def _shared(
    members: Sequence[_Member], first: int, source: str | int, tokens: Mapping[str, Mapping[str, Any]]
) -> Tokenizer:
    """The tokenizer of the result."""
    if source not in ("union", "base"):
        if isinstance(source, str):
            raise Error(
                f"share_vocabulary: source is 'union', 'base' or the place of a model, got {source!r}"
                + did_you_mean(source, ("union", "base"))
            )
        _checked_place(source, len(members), "source")
        return joined(members[source].tokenizer, (), tokens)
    others = [m.tokenizer for place, m in enumerate(members) if place != first] if source == "union" else []
    return joined(members[first].tokenizer, others, tokens)


class _Fills:
    """Which rows make the row of a token, where it is not a model's own."""

    def __init__(self, members: Sequence[_Member], base: int | None, tokens: Mapping[str, Mapping[str, Any]]):
        self.known = [member.tokenizer.ids for member in members]
        self.members, self.base = members, base
        self.forced = {token for token, wish in tokens.items() if _checked(token, wish).get("force")}
        self.asked = {
            token: self._asked(token, wish["source"])
            for token, wish in tokens.items()
            if wish.get("source") is not None
        }

    def terms(self, place: int, ids: Mapping[str, int], rows: int) -> list[tuple[Term, ...] | None]:
        """For every row what it is the mean of; None where no token is."""
        terms: list[tuple[Term, ...] | None] = [None] * rows
        own = self.known[place]
        for token, index in ids.items():
            keeps = token in own and token not in self.forced
            terms[index] = ((place, own[token]),) if keeps else self._fill(token)
        return terms

    def _fill(self, token: str) -> tuple[Term, ...]:
        if token in self.asked:
            return self.asked[token]
        donors = tuple((place, ids[token]) for place, ids in enumerate(self.known) if token in ids)
        if not donors:
            raise Error(
                f"share_vocabulary: no model has a row for the token {token!r}; give it one with "
                f"tokens={{{token!r}: {{'source': ...}}}}"
            )
        if self.base is not None and len(donors) > 1:
            return tuple(term for term in donors if term[0] == self.base) or donors
        return donors

    def _asked(self, token: str, source: Any) -> tuple[Term, ...]:
        where = f"share_vocabulary: tokens[{token!r}]: source"
        if not isinstance(source, Mapping):
            _checked_place(source, len(self.members), where.removeprefix("share_vocabulary: "))
            return ((source, self._row(source, token, where)),)
        kind = source.get("kind")
        if kind == "zero" and len(source) == 1:
            return ()
        if kind != "model_token" or len(source) != 3 or not {"token", "token_id"} & source.keys():
            raise Error(
                f"{where} is the place of a model, {{'kind': 'zero'}}, or {{'kind': 'model_token', 'model': place}} "
                f"with either 'token' or 'token_id'; got {dict(source)!r}"
            )
        place = _checked_place(source.get("model"), len(self.members), f"tokens[{token!r}]: model")
        if "token" in source:
            return ((place, self._row(place, source["token"], where)),)
        index, rows = source["token_id"], self.members[place].rows
        if not isinstance(index, int) or not 0 <= index < rows:
            raise Error(f"{where}: {self.members[place].where} has rows 0 to {rows - 1}, and none {index!r}")
        return ((place, index),)

    def _row(self, place: int, token: str, where: str) -> int:
        if token not in self.known[place]:
            raise Error(f"{where}: {self.members[place].where} has no token {token!r}")
        return self.known[place][token]


def _checked(token: str, wish: Any) -> Mapping[str, Any]:
    if not isinstance(wish, Mapping) or wish.keys() - {"source", "force"}:
        raise Error(f"share_vocabulary: tokens[{token!r}] is {{'source': ..., 'force': ...}}, got {wish!r}")
    return wish


# The result


def _over(
    members: Sequence[_Member],
    place: int,
    terms: Sequence[tuple[Term, ...] | None],
    shared: Tokenizer,
    donor: _Member,
    options: Mapping[str, Any],
) -> Weights:
    """One of the models over the shared vocabulary."""
    mine = members[place]
    seats = sorted({k for t in terms if t for k, _ in t} - {place})
    seat = {k: number for number, k in enumerate((place, *seats))}  # the order in which nodes are handed over
    seated = [None if t is None else [(seat[k], row) for k, row in t] for t in terms]
    taken = [t for t in seated if t is not None]
    order = Order.of([[(len(seat), 0)] if t is None else t for t in seated])
    averaged = Order.of(sorted(taken))  # a mean asks for no order, and files are read fastest in their own
    as_it_is = seated == [[(0, row)] for row in range(mine.rows)]

    def build(name: str, own: Lazy, *theirs: Lazy) -> Lazy:
        if name not in mine.axes or as_it_is:
            return own
        axis, nodes = mine.axes[name], (own, *theirs)
        if len(taken) < len(seated):
            nodes += (mean_slice(Rows(nodes, averaged, own.spec.dtype, axis), axis),)
        return Rows(nodes, order, own.spec.dtype, axis)

    others = tuple(members[k].weights for k in seats)
    made = mine.weights.zip_nodes(build, others, "merge.share_vocabulary", {"model": place, **options})
    files = {name: file for name, file in mine.weights.files.items() if name not in FILES} | dict(shared.files)
    named = {index: token for token, index in mine.tokenizer.ids.items()}
    for name in ("config.json", "generation_config.json"):
        if name in files:
            said = parsed(mine.weights.files, name, mine.where)
            theirs = parsed(donor.weights.files, name, donor.where)
            changed = _followed(said, theirs, named, shared.ids, _vocab_size(said), len(terms))
            if changed != said:
                files[name] = written(changed)
    return Weights({name: made.node(name) for name in made}, made.lineage, files, made.metadata)


def _followed(
    said: Any, theirs: Any, named: Mapping[int, str], ids: Mapping[str, int], before: int | None, after: int
) -> Any:
    """A configuration after the vocabulary moved. For tokens that are gone, what the donor of the tokenizer says."""
    result = {}
    for key, value in said.items():
        other = theirs.get(key) if isinstance(theirs, Mapping) else None
        if isinstance(value, Mapping):
            value = _followed(value, other, named, ids, before, after)
        elif key == "vocab_size" and value == before:
            value = after
        elif _IDS.search(key) and _is_id(value):
            value = ids.get(named.get(value, ""), other)
        elif _IDS.search(key) and isinstance(value, list) and all(map(_is_id, value)):
            value = [ids[named[index]] for index in value if named.get(index) in ids] or other
        result[key] = value
    return result


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
