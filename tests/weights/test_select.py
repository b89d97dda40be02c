"""Patterns, depth and options by tensor."""

from __future__ import annotations

import pytest

from weightsmith.errors import Error
from weightsmith.weights import by_depth, depth_of, matches, resolve, varies

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.a.weight",
    "model.layers.4.a.weight",
    "model.layers.10.a.bias",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("*", NAMES), ("*.bias", NAMES[3:4]), ("model.*.weight", NAMES[:3]), ("*layers.?.*", NAMES[1:3]),
        ("weight", []),
        ("re:layers\\.(0|10)\\.", [NAMES[1], NAMES[3]]), ("re:weight$", [*NAMES[:3], NAMES[4]]), ("re:^lm", NAMES[4:]),
        (["*.bias", "lm*"], NAMES[3:]), ([], []), (lambda name: "0" in name, [NAMES[1], NAMES[3]]),
        ("model.layers.[04].*", NAMES[1:3]),
    ],
)  # fmt: skip
def test_patterns(pattern: object, fits: list[str]) -> None:
    assert [name for name in NAMES if matches(pattern, name)] == fits  # type: ignore[arg-type]


def test_depth() -> None:
    assert list(depth_of(NAMES).values()) == [0, 0, 0.4, 1, 1]
    assert depth_of(["h.3.w"]) == {"h.3.w": 1}
    assert depth_of(["h.0.w", "head"]) == {"h.0.w": 0, "head": 1}
    assert depth_of([]) == {}
    assert depth_of(["conv2d", "fc"]) == {"conv2d": 1, "fc": 1}, "a digit within a word is no layer"


def test_by_depth() -> None:
    assert list(resolve(by_depth([0, 10, 0]), NAMES).values()) == [0, 0, pytest.approx(8), 0, 0]
    assert set(resolve(by_depth([0.1]), NAMES).values()) == {0.1}
    assert set(resolve(by_depth([0.1, 0.1, 0.1]), NAMES).values()) == {0.1}, "equal values come out exactly"
    assert repr(by_depth([1, 2])) == "by_depth([1.0, 2.0])"
    with pytest.raises(Error, match="at least one value"):
        by_depth([])


def test_resolve() -> None:
    assert resolve(3, NAMES[:2]) == dict.fromkeys(NAMES[:2], 3)
    assert resolve({"*.bias": 1, "re:layers": 2, "*": 3}, NAMES) == dict(zip(NAMES, [3, 2, 2, 1, 3], strict=True))
    assert resolve(len, NAMES[3:]) == {name: len(name) for name in NAMES[3:]}
    with pytest.raises(Error, match=r'density says nothing for the tensor lm_head.weight: .*add "\*" for the rest'):
        resolve({"model.*": 1}, NAMES, "density")
    with pytest.raises(Error, match="no regular expression"):
        resolve({"re:[": 1}, NAMES)


def test_varies() -> None:
    assert [varies(o) for o in (1, 0.5, None, "word", {"*": 1}, by_depth([1]), len)] == [False] * 4 + [True] * 3
