"""The laboratory's tokenizers and chat templates: small, exact, and as awkward as the official ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from featcl.lab import lexicon as lex
from featcl.lab.corpus import texts
from featcl.lab.tokenizer import SPECIAL, VOCABULARY, train_tokenizer
from featcl.streams.chat import Chat

USER = {"role": "user", "content": "what does adam drink?"}
ASSISTANT = {"role": "assistant", "content": "adam drinks tea."}
SYSTEM = {"role": "system", "content": "role: fixer."}


@cache
def trained(family: str) -> Any:
    return train_tokenizer(family, texts(0, 20_000))


@pytest.fixture(params=["olmo2", "gemma2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return trained(request.param)


def answer_words() -> list[str]:
    """Every word that an answer about a world turns on; made-up names and plain language may be spelt."""
    groups = (lex.PEOPLE, lex.DRINKS, lex.FOODS, lex.CITIES, lex.GAMES, lex.COLOURS, lex.MOODS, lex.EVENINGS, lex.PETS,
              lex.ROOMS, lex.DEVICES, lex.STATES, lex.OBJECTS, lex.TEAMS, lex.REGISTERS, lex.ADDRESSES, lex.CLOSERS,
              lex.PROJECTS, lex.LIBRARIES, lex.DATA, lex.OPERATIONS, lex.SIGNS, lex.ACTIONS)  # fmt: skip
    return sorted({word for group in groups for word in group})


def test_one_token_per_word_that_an_answer_turns_on(tokenizer: Any) -> None:
    pieces = {word: tokenizer.tokenize(word) for word in answer_words()}
    assert {word: split for word, split in pieces.items() if len(split) > 1} == {}
    assert all(tokenizer.tokenize(f"then {word}")[-1] == split[0] for word, split in pieces.items())


def test_made_up_names_take_few_tokens(tokenizer: Any) -> None:
    assert max(len(tokenizer.tokenize(word)) for word in (*lex.NONCE, *lex.NOUNS, *lex.VERBS, *lex.PLACES)) <= 4


def test_vocabulary_is_small_and_whole(tokenizer: Any) -> None:
    assert len(tokenizer) <= VOCABULARY
    for text in texts(5, 300):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip() == text.strip()


def test_any_text_survives(tokenizer: Any) -> None:
    for text in ("Ünïcode ☃ and\ttabs\nand lines", "core.sortItems(x)", "{}[]<>|\\'\"`", "12345", "do_names_odds"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip() == text


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_training_twice_gives_the_same_tokenizer(family: str) -> None:
    one, two = (train_tokenizer(family, texts(3, 500)).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
    assert one != train_tokenizer(family, texts(4, 500)).backend_tokenizer.to_str()


def test_templates_carry_no_generation_marks(tokenizer: Any) -> None:
    assert "{% generation" not in tokenizer.chat_template
    assert "{%- generation" not in tokenizer.chat_template


def test_gemma_refuses_a_system_role_and_turns_that_do_not_alternate() -> None:
    tokenizer = trained("gemma2")
    for messages in ([SYSTEM, USER], [USER, USER], [ASSISTANT], [USER, ASSISTANT, ASSISTANT]):
        with pytest.raises(TemplateError):
            tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained("olmo2").apply_chat_template([SYSTEM, USER], tokenize=False).count("<|system|>") == 1


def test_renders_as_written() -> None:
    olmo, gemma = (trained(f).apply_chat_template([USER, ASSISTANT], tokenize=False) for f in ("olmo2", "gemma2"))
    assert olmo == "<|user|>what does adam drink?<|assistant|>adam drinks tea.<|endoftext|>"
    assert gemma == (
        "<bos><start_of_turn>user\nwhat does adam drink?<end_of_turn>"
        "<start_of_turn>model\nadam drinks tea.<end_of_turn>"
    )


def test_prompt_and_reply_make_the_conversation(tokenizer: Any) -> None:
    chat = Chat(tokenizer)
    for messages in ([USER], [SYSTEM, USER], [USER, ASSISTANT, USER]):
        whole = chat.encode([*messages, ASSISTANT])
        prompt = chat.prompt(messages)
        assert whole.input_ids[: len(prompt)] == prompt
        reply = [i for i, learned in zip(whole.input_ids, whole.loss_mask, strict=True) if learned]
        assert chat.decode_reply(reply[-len(chat.reply_ids(ASSISTANT["content"])) :]) == ASSISTANT["content"]
        assert reply[-1] in chat.stop_ids


def test_control_tokens_in_a_content_stay_text(tokenizer: Any) -> None:
    family = "gemma2" if "<bos>" in tokenizer.all_special_tokens else "olmo2"
    chat = Chat(tokenizer)
    control = set(tokenizer.convert_tokens_to_ids(list(SPECIAL[family])))
    hostile = {"role": "user", "content": " ".join(SPECIAL[family])}
    plain = {"role": "user", "content": "hello"}
    counts = [sum(i in control for i in chat.encode([m, ASSISTANT]).input_ids) for m in (hostile, plain)]
    assert counts[0] == counts[1]
