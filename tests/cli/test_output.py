"""Tables: aligned, never cut, and stacked where the terminal is narrow."""

from __future__ import annotations

from weightsmith.cli._output import clean, echo_table, laid_out, percent, size

NAME = "transformer.h.0.attn.c_attn.weight"
ROWS = [[NAME, "float32", "1"], ["w", "int8", "1000"]]


def test_columns_line_up():
    lines = laid_out(["name", "dtype", "n"], ROWS, left=2)
    assert lines[1] == f"{NAME}  float32     1"
    assert lines[2] == f"{'w':<{len(NAME)}}  int8     1000"


def test_a_narrow_terminal_gets_names_on_their_own_lines():
    lines = laid_out(["name", "dtype", "n"], ROWS, left=2, room=40)
    assert lines == ["name", "  dtype       n", NAME, "  float32     1", "w", "  int8     1000"]
    wide = laid_out(["name", "dtype", "n"], ROWS, left=2, room=len(NAME) + 15)
    assert len(wide) == 3
    assert max(map(len, wide)) == len(NAME) + 15
    assert len(laid_out(["name", "dtype", "n"], ROWS, left=2, room=len(NAME) + 14)) == 6


def test_nothing_is_cut_when_piped(capsys):
    echo_table(["name", "x"], [["n" * 500, "1"]])
    assert "n" * 500 + "  1\n" in capsys.readouterr().out


def test_wide_characters_take_two_columns():
    lines = laid_out(["n", "x"], [["日本", "1"], ["abcd", "2"]])
    assert lines[1:] == ["日本  1", "abcd  2"]


def test_escapes():
    assert clean("a\x1b[2J\u202eb\udc80") == "a\\x1b[2J\\u202eb\\udc80"
    assert clean("größe 日本") == "größe 日本"


def test_sizes_and_shares_do_not_round_into_lies():
    assert size(999_960) == "1.0 MB"
    assert size(0) == "0 B"
    assert percent(1 - 1e-9) == ">99.9%"
    assert percent(1.0) == "100%"
