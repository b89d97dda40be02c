"""Arithmetic on whole checkpoints written as a line: ``base + 0.5 * (tuned - base)``."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from weightsmith.errors import Error
from weightsmith.weights import Weights

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.BitOr: operator.or_,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: lambda value: value}

LONGEST = 1000  # characters
DEEPEST = 100
"""Operations within one another; every one is a level of laziness."""


def names_in(text: str) -> list[str]:
    """The names that an expression speaks of, each once.

    >>> names_in("base + 0.5 * (tuned - base)")
    ['base', 'tuned']
    """
    found = [node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name)]
    return list(dict.fromkeys(sorted(found, key=text.index)))


def evaluated(text: str, known: Callable[[str], Weights]) -> Weights:
    """The value of an expression. Numbers, names, ``+ - * /``, ``|`` (overlay) and brackets; nothing else runs.

    >>> a, b = ({"w": torch.tensor([value])} for value in (1.0, 5.0))
    >>> weights = {"a": ws.open(a), "b": ws.open(b)}
    >>> evaluated("a + 0.5 * (b - a)", weights.__getitem__)["w"]
    tensor([3.])
    """
    tree = _parsed(text).body
    if _depth(tree) > DEEPEST:
        raise Error(f"an expression of more than {DEEPEST} operations within one another; write several steps")
    found = _value(tree, known)
    if not isinstance(found, Weights):
        raise Error(f"the expression {text!r} is a number, not weights")
    return found


def _depth(node: ast.AST) -> int:
    deepest, level = 0, list(ast.iter_child_nodes(node))
    while level:
        deepest, level = deepest + 1, [child for one in level for child in ast.iter_child_nodes(one)]
    return deepest


def _parsed(text: str) -> ast.Expression:
    if len(text) > LONGEST:
        raise Error(f"an expression of {len(text)} characters is too long; write several steps")
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Error(f"the expression {text!r} cannot be read: {getattr(error, 'msg', error)}") from None


def _value(node: ast.expr, known: Callable[[str], Weights]) -> Any:
    if isinstance(node, ast.Name):
        return known(node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _number(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, known))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, known), _value(node.right, known)
        if isinstance(node.op, ast.BitOr) and not (isinstance(left, Weights) and isinstance(right, Weights)):
            raise Error(f"{ast.unparse(node)!r} has no value: | lays weights over weights")
        if isinstance(node.op, ast.Div) and not isinstance(right, Weights) and right == 0:
            raise Error(f"{ast.unparse(node)!r} divides by zero")
        try:
            return _BINARY[type(node.op)](left, right)
        except (TypeError, ArithmeticError) as error:
            raise Error(f"{ast.unparse(node)!r} has no value: {error}") from None
    raise Error(f"{ast.unparse(node)!r} is not understood; an expression has names, numbers, + - * / | and brackets")


def _number(value: float) -> float:
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Error("an expression has a number that is too large")
    return value
