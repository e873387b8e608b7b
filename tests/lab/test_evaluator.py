"""The restricted evaluator: what it refuses, and that what it computes is what Python computes."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
import warnings

import pytest

from featcl.lab import lexicon as lex
from featcl.lab.evaluator import MAX_NUMBER, MAX_SOURCE, MEANINGS, CodeError, evaluate, parse, same_code

FUNCTIONS = {f"core.{name}": name for name in MEANINGS}
DATA = {"items": (3, 1, 2, 3)}

HOSTILE = {
    "import": "import os",
    "from import": "from os import system",
    "dunder import": "__import__('os')",
    "call of a builtin": "eval(items)",
    "attribute of a value": "items.__class__",
    "dunder chain": "core.sort.__globals__",
    "call through a dunder": "core.__class__(items)",
    "subscript": "items[0]",
    "lambda": "(lambda: 1)()",
    "comprehension": "[x for x in items]",
    "generator": "sum(x for x in items)",
    "power": "9**9**9",
    "shift": "1<<99999999999",
    "product": "9*9",
    "string": "'a'",
    "format string": "f'{items}'",
    "keyword": "core.sort(x=items)",
    "starred": "core.sort(*items)",
    "double starred": "core.sort(**items)",
    "no argument": "core.sort()",
    "two arguments": "core.sort(items, items)",
    "conditional": "1 if items else 2",
    "walrus": "(x := 1)",
    "await": "await items",
    "statements": "core.sort(items)\ncore.sort(items)",
    "semicolon": "core.sort(items); core.sum(items)",
    "comment": "core.sort(items) # or core.sum(items)",
    "loop": "while True: pass",
    "definition": "def f(): return 1",
    "chained assignment": "a = b = items",
    "assignment to an attribute": "core.sort = items",
    "unpacking": "a, b = items",
    "tuple": "items, items",
    "true": "True",
    "none": "None",
    "float": "1.5",
    "ellipsis": "...",
    "null byte": "items\0",
    "look-alike letters": "core.ｓort(items)",
    "line continuation": "core.\\\nsort(items)",
    "empty": "",
    "unknown function": "core.shout(items)",
    "unknown library": "flux.sort(items)",
    "unknown name": "core.sort(prices)",
    "number for a list": "core.sort(3)",
    "empty list": "core.max([])",
    "nested list": "core.sum([[1], [2]])",
    "result of a result": "core.sort(items)(items)",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses(source: str) -> None:
    with pytest.raises(CodeError):
        evaluate(source, functions=FUNCTIONS, data=DATA)


@pytest.mark.parametrize(
    "source",
    [
        "core.sort(" * 30 + "items" + ")" * 30,
        "(" * 399,
        "[" * 190 + "]" * 190,
        "a." * 190 + "a",
        "x" * (MAX_SOURCE + 1),
        "1" * 399,
        "[" + "9" * 300 + "]",
        "core.square(" * 5 + "[99999]" + ")" * 5,
        "core.square(" * 11 + "items" + ")" * 11,
    ],
    ids=["deep calls", "brackets", "lists", "attributes", "long", "huge", "huge in a list", "huge result", "huge deep"],
)
def test_refuses_what_is_too_large_at_once(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(CodeError):
        evaluate(source, functions=FUNCTIONS, data=DATA)
    assert time.perf_counter() - start < 0.5


def test_what_is_just_small_enough_is_computed() -> None:
    """The control: the limits refuse the hostile, not the merely nested."""
    assert evaluate("core.sort(" * 5 + "items" + ")" * 5, functions=FUNCTIONS, data=DATA) == (1, 2, 3, 3)
    assert evaluate(str(MAX_NUMBER), functions={}, data={}) == MAX_NUMBER


def test_random_text_never_raises_anything_else() -> None:
    rng = random.Random(0)
    pieces = ["core", ".", "sort", "(", ")", "[", "]", "items", "1", ",", "=", " ", "\n", "lambda", "0x1", "1if", "__"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not even a remark of the parser
        for _ in range(3000):
            source = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
            with contextlib.suppress(CodeError):
                evaluate(source, functions=FUNCTIONS, data=DATA)


PLAIN = {
    "sort": lambda x: sorted(x),
    "reverse": lambda x: list(reversed(x)),
    "count": lambda x: len(x),
    "sum": lambda x: sum(x),
    "max": lambda x: sorted(x)[-1],
    "min": lambda x: sorted(x)[0],
    "first": lambda x: next(iter(x)),
    "last": lambda x: next(reversed(x)),
    "unique": lambda x: [v for i, v in enumerate(x) if v not in x[:i]],
    "double": lambda x: [v + v for v in x],
    "negate": lambda x: [0 - v for v in x],
    "square": lambda x: [v**2 for v in x],
    "evens": lambda x: [v for v in x if not v & 1],
    "odds": lambda x: [v for v in x if v & 1],
    "rest": lambda x: x[1:],
    "sums": lambda x: [sum(x[: i + 1]) for i in range(len(x))],
}


def test_every_operation_of_the_lexicon_has_a_meaning() -> None:
    assert list(MEANINGS) == list(lex.OPERATIONS) == list(PLAIN)


@pytest.mark.parametrize("operation", PLAIN)
def test_means_what_python_computes(operation: str) -> None:
    rng = random.Random(operation)
    for _ in range(100):
        values = [rng.randrange(0, 30) for _ in range(rng.randint(1, 6))]
        got = evaluate(f"core.{operation}(items)", functions=FUNCTIONS, data={"items": tuple(values)})
        want = PLAIN[operation](values)
        assert got == (tuple(want) if isinstance(want, list) else want)


def test_operations_compose_and_libraries_rename() -> None:
    functions = {"zed.blim": "sort", "zed.tarn": "first"}
    assert evaluate("zed.tarn(zed.blim([7, 3, 5]))", functions=functions, data={}) == 3
    with pytest.raises(CodeError, match=r"unknown function core\.sort"):
        evaluate("core.sort([7, 3, 5])", functions=functions, data={})


def test_no_two_operations_are_the_same() -> None:
    probe = (4, 1, 6, 1, 3, 9, 2)
    values = [meaning(probe) for meaning in MEANINGS.values()]
    assert len(set(values)) == len(values)


def test_parse_splits_target_and_expression() -> None:
    assert parse("a = core.sort(items)")[0] == "a"
    assert parse("core.sort(items)")[0] is None


SAME = ["core.sort(items)", " core.sort( items )\n", "core . sort(items)", "(core.sort)((items))", "core.sort(items,)"]
OTHER = [
    "core.sort(prices)", "core.sum(items)", "zed.sort(items)", "sort(items)", "x = core.sort(items)", "core.sort",
    "core.sort(items) # core.sort(items)", "core.sort(core.sort(items))", "core.sort([items])", "core.sort(items", "",
]  # fmt: skip


def test_same_code_forgives_spaces_and_brackets_only() -> None:
    assert all(same_code(a, b) for a, b in itertools.product(SAME, SAME))
    assert not any(same_code(a, b) or same_code(b, a) for a, b in itertools.product(SAME, OTHER))


def test_same_code_compares_the_target() -> None:
    assert same_code("a=core.sort(items)", "a = core.sort( items )")
    assert not same_code("b = core.sort(items)", "a = core.sort(items)")


def test_two_broken_texts_are_not_the_same_code() -> None:
    assert not same_code("core.sort(", "core.sort(")
