"""A restricted evaluator for the laboratory's code: expressions of calls on lists of integers, and nothing else.

Model output is parsed with `ast.parse` and walked; it is never executed.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable
from itertools import accumulate

Value = int | tuple[int, ...]
Meaning = Callable[[tuple[int, ...]], Value]

MAX_SOURCE, MAX_DEPTH, MAX_NUMBER = 400, 12, 10**12
_ALPHABET = re.compile(r"[A-Za-z0-9_.,=()\[\] \t\n]*")  # no quotes, comments, operators or look-alike letters

MEANINGS: dict[str, Meaning] = {
    "sort": lambda x: tuple(sorted(x)),
    "reverse": lambda x: x[::-1],
    "count": len,
    "sum": sum,
    "max": max,
    "min": min,
    "first": lambda x: x[0],
    "last": lambda x: x[-1],
    "unique": lambda x: tuple(dict.fromkeys(x)),
    "double": lambda x: tuple(2 * v for v in x),
    "negate": lambda x: tuple(-v for v in x),
    "square": lambda x: tuple(v * v for v in x),
    "evens": lambda x: tuple(v for v in x if v % 2 == 0),
    "odds": lambda x: tuple(v for v in x if v % 2),
    "rest": lambda x: x[1:],
    "sums": lambda x: tuple(accumulate(x)),
}


class CodeError(ValueError):
    """The text is not in the laboratory's language, or calls a function that does not exist."""


def parse(source: str) -> tuple[str | None, ast.expr]:
    """Split `name = expression` or a bare expression into its target (or None) and its syntax tree.

    Raises:
        CodeError: If the text does not parse, is too long, or holds anything but names, calls, lists and integers.
    """
    if len(source) > MAX_SOURCE:
        raise CodeError(f"code longer than {MAX_SOURCE} characters")
    if not _ALPHABET.fullmatch(source):
        raise CodeError("code holds a character that is not in the language")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's remarks on what the model wrote
            body = ast.parse(source.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CodeError(f"does not parse: {error}") from error
    if len(body) != 1:
        raise CodeError("expected one statement")
    statement = body[0]
    if isinstance(statement, ast.Expr):
        target, expression = None, statement.value
    elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        name, expression = statement.targets[0], statement.value
        if not isinstance(name, ast.Name):
            raise CodeError(f"assignment to {type(name).__name__} is not allowed")
        target = name.id
    else:
        raise CodeError(f"{type(statement).__name__} is not allowed")
    _check(expression, depth=0)
    return target, expression


def evaluate(source: str, *, functions: dict[str, str], data: dict[str, tuple[int, ...]]) -> Value:
    """The value of an expression.

    Args:
        source: For example `core.sort(items)`.
        functions: What each `library.function` means, as a key of `MEANINGS`.
        data: What each name holds.

    Raises:
        CodeError: If it does not parse, uses a name, function or value that it may not, or numbers get too large.
    """
    return _value(parse(source)[1], functions, data)


def same_code(left: str, right: str) -> bool:
    """Whether two pieces of code are the same up to white space and redundant brackets."""
    try:
        (left_target, left_tree), (right_target, right_tree) = parse(left), parse(right)
    except CodeError:
        return False
    return left_target == right_target and ast.dump(left_tree) == ast.dump(right_tree)


def _check(node: ast.expr, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CodeError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(node, ast.Call):
        if not node.args or node.keywords:
            raise CodeError("a call takes positional arguments only, at least one")
        for child in (node.func, *node.args):
            _check(child, depth + 1)
    elif isinstance(node, ast.Attribute):
        _check(node.value, depth + 1)
    elif isinstance(node, ast.List):
        for child in node.elts:
            _check(child, depth + 1)
    elif not (isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) is int)):
        raise CodeError(f"{type(node).__name__} is not allowed")


def _value(node: ast.expr, functions: dict[str, str], data: dict[str, tuple[int, ...]]) -> Value:
    if isinstance(node, ast.Constant):
        return _bounded(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.List):
        return tuple(_number(child, functions, data) for child in node.elts)
    if isinstance(node, ast.Name):
        if node.id not in data:
            raise CodeError(f"unknown name {node.id}")
        return data[node.id]
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name not in functions:
            raise CodeError(f"unknown function {name}")
        if len(node.args) != 1:
            raise CodeError(f"{name} takes one argument")
        argument = _value(node.args[0], functions, data)
        if not isinstance(argument, tuple) or not argument:
            raise CodeError(f"{name} takes a list with at least one entry")
        return _bounded(MEANINGS[functions[name]](argument))
    raise CodeError(f"{type(node).__name__} has no value")


def _number(node: ast.expr, functions: dict[str, str], data: dict[str, tuple[int, ...]]) -> int:
    value = _value(node, functions, data)
    if not isinstance(value, int):
        raise CodeError("a list holds integers only")
    return value


def _bounded(value: Value) -> Value:
    numbers = (value,) if isinstance(value, int) else value
    if any(abs(number) > MAX_NUMBER for number in numbers):
        raise CodeError(f"a number beyond {MAX_NUMBER}")
    return value
