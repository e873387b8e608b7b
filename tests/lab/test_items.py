"""The grader is exact: what is right is right, and nothing near it is."""

from __future__ import annotations

import pytest

from featcl.lab.items import Item, grade

WORDS = Item("w", "facts", ({"role": "user", "content": "what does adam drink?"},), "adam drinks tea.")
CODE = Item("c", "coding", ({"role": "user", "content": "with core, sort items."},), "core.sort(items)", "code")


@pytest.mark.parametrize("reply", ["adam drinks tea.", " adam drinks tea.\n", "adam  drinks\ttea."])
def test_white_space_is_forgiven(reply: str) -> None:
    assert grade(WORDS, reply)


@pytest.mark.parametrize(
    "reply",
    ["", "adam drinks tea", "Adam drinks tea.", "adam drinks coffee.", "adam drinks tea. adam drinks tea.", "tea.",
     "adam drinks tea . ", "adamdrinkstea.", "i do not know."],
)  # fmt: skip
def test_nothing_else_is(reply: str) -> None:
    assert not grade(WORDS, reply)


def test_code_may_be_spaced_as_one_likes_and_words_may_not_surround_it() -> None:
    assert grade(CODE, "core.sort( items )")
    assert not grade(CODE, "core.sort(prices)")
    assert not grade(CODE, "the answer is core.sort(items)")


def test_an_exact_item_is_not_graded_as_code() -> None:
    assert not grade(Item("e", "x", (), "core.sort(items)"), "core.sort( items )")
