"""Long conversations: the same by seed, disjoint by part, and their answers stand in their notes alone."""

from __future__ import annotations

from itertools import islice

from featcl.lab import lexicon as lex
from featcl.lab.long import HELD_OUT, LongConversation, long_conversations, part_of
from featcl.lab.phrases import fact_note
from featcl.lab.world import Fact


def drawn(count: int, **options: object) -> list[LongConversation]:
    return list(islice(long_conversations(0, **options), count))  # type: ignore[arg-type]


def test_the_same_seed_twice_and_another() -> None:
    assert drawn(20) == drawn(20)
    assert drawn(20) != list(islice(long_conversations(1), 20))
    assert drawn(20) != drawn(20, part="heldout")


def notes_of(conversations: list[LongConversation]) -> set[str]:
    return {note.strip() + "." for each in conversations for note in each.notes.split(".") if note.strip()}


def test_no_fact_is_told_in_both_parts() -> None:
    every = {
        part: {
            fact_note(fact)
            for person in lex.PEOPLE
            for attribute, (values, _, _) in lex.ATTRIBUTES.items()
            for value in values
            if part_of(fact := Fact(person, attribute, value)) == part
        }
        for part in ("train", "heldout")
    }
    assert not every["train"] & every["heldout"]
    share = len(every["heldout"]) / sum(map(len, every.values()))
    assert abs(share - 1 / HELD_OUT) < 0.02
    for part, other in (("train", "heldout"), ("heldout", "train")):
        told = notes_of(drawn(300, part=part))
        assert told <= every[part]
        assert not told & every[other]


def test_what_is_asked_was_told_once_and_nothing_between_tells_it() -> None:
    for conversation in drawn(300, between=(1, 6), asked=2):
        for answer in conversation.answers:
            assert conversation.notes.count(answer) == 1
            between = [e for window in conversation.windows[:-1] for e in window]
            assert not any(answer in (exchange.user, exchange.assistant) for exchange in between)
            assert not any(answer.rstrip(".") in exchange.user for exchange in conversation.windows[-1])


def test_windows_by_the_talk_between() -> None:
    """One exchange stands after the notes, then `together` in each window, then the questions."""
    for between, sizes in ((1, [1]), (2, [1, 1]), (5, [1, 2, 2]), (6, [1, 2, 2, 1])):
        for conversation in drawn(10, between=(between, between)):
            assert [len(window) for window in conversation.windows[:-1]] == sizes
            assert 1 <= len(conversation.answers) <= 2
    first = drawn(1, between=(3, 3))[0]
    messages = first.messages(1)
    assert messages[0] == {"role": "system", "content": first.notes}
    assert len(messages) == 3
    assert first.messages()[: len(messages)] == messages
