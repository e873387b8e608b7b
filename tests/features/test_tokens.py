"""Texts become windows and batches: BOS once, padding marked, nothing lost."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features.tokens import (
    adds_bos,
    read_documents,
    read_texts,
    texts_digest,
    token_batches,
    token_text,
    token_windows,
)


def test_windows_hold_every_token_once(tiny):
    _, tokenizer = tiny()
    text = "abcdefghij" * 5
    windows = list(token_windows(tokenizer, [text, "xyz"], context=16))
    assert [len(window) for window in windows] == [16, 16, 16, 2, 3]
    assert tokenizer.decode([token for window in windows[:4] for token in window]) == text


def test_bos_follows_the_tokenizer_and_is_never_doubled(tiny):
    _, tokenizer = tiny()
    assert not adds_bos(tokenizer)
    bos = tokenizer.bos_token_id
    assert bos not in next(token_windows(tokenizer, ["ab"], context=8))
    for text in ("ab", tokenizer.bos_token + "ab", [bos, 1, 2]):
        assert next(token_windows(tokenizer, [text], context=8, prepend_bos=True)).count(bos) == 1
    long = list(token_windows(tokenizer, ["a" * 20], context=8, prepend_bos=True))
    assert all(window[0] == bos for window in long)
    assert sum(len(window) - 1 for window in long) == 20


def test_real_tokenizer_adds_bos(real):
    from featcl.models import load_tokenizer

    tokenizer = load_tokenizer(real / "models" / "stories260K")
    assert adds_bos(tokenizer)
    assert next(token_windows(tokenizer, ["Once upon a time"], context=64)) == tokenizer("Once upon a time").input_ids


def test_batches_leave_out_bos_and_padding(tiny):
    _, tokenizer = tiny()
    windows = list(token_windows(tokenizer, ["abcdef", "ab", "abcd"], context=16, prepend_bos=True))
    (batch,) = token_batches(windows, tokenizer)
    assert batch.counted.sum(dim=1).tolist() == [2, 4, 6]
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 5, 7]
    assert not batch.counted[:, 0].any()
    without_bos = next(token_batches(token_windows(tokenizer, ["abcdef"], context=16), tokenizer))
    assert without_bos.counted.all()


def test_batches_respect_their_size_and_keep_every_token(tiny):
    _, tokenizer = tiny()
    texts = ["a" * (1 + (7 * i) % 50) for i in range(200)]
    batches = list(token_batches(token_windows(tokenizer, texts, context=64), tokenizer, batch_tokens=256))
    assert all(batch.input_ids.numel() <= 256 for batch in batches)
    assert sum(int(batch.counted.sum()) for batch in batches) == sum(map(len, texts))
    padded = sum(batch.input_ids.numel() for batch in batches)
    assert padded < 1.2 * sum(map(len, texts))  # grouped by length


def test_read_texts(tmp_path):
    path = tmp_path / "two.txt.gz"
    path.write_bytes(gzip.compress("first\n\nstill first\n\f\nsecond é\n".encode()))
    assert read_texts(path) == ["first\n\nstill first", "second é"]
    for name, data, says in (
        ("no.txt", None, "does not exist"),
        ("b.txt", b"\xff\xfe", "UTF-8"),
        ("e.txt", b"\n", "no"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(FeatclError, match=says):
            read_texts(tmp_path / name)


def test_digest_sees_order_and_boundaries():
    assert texts_digest(["ab", "c"]) == texts_digest(["ab", "c"])
    assert len({texts_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [[1, 2]])}) == 5


def test_ids_of_a_tensor_batch_are_exact(tiny):
    _, tokenizer = tiny()
    (batch,) = token_batches([[5, 6, 7]], tokenizer)
    assert torch.equal(batch.input_ids, torch.tensor([[5, 6, 7]]))


def test_documents_of_a_stream(tiny, tmp_path):
    """Raw text stays text, a conversation becomes the ids of the chat template; plain JSONL of texts works too."""
    _, tokenizer = tiny()
    path = tmp_path / "stream.jsonl.gz"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    lines = [{"id": "a", "text": "raw"}, {"id": "b", "messages": messages}]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    raw, chat = read_documents(path, tokenizer)
    assert raw == "raw"
    assert list(chat) == list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one\\u2028still one"}\n\n{"text": "two"}\n{"text": " "}\n')
    assert read_documents(texts, tokenizer) == ["one\u2028still one", "two"]
    assert read_documents(_text(tmp_path, "first\fsecond"), tokenizer) == ["first", "second"]
    with pytest.raises(FeatclError, match="is a stream, not a text file"):
        read_texts(path)


def _text(folder, content):
    (folder / "plain.txt").write_text(content)
    return folder / "plain.txt"


def test_one_token_as_text(tiny, real):
    from featcl.models import load_tokenizer

    _, tokenizer = tiny()
    pound = tokenizer("£").input_ids
    assert len(pound) == 2
    assert "\ufffd" not in token_text(tokenizer, pound[0])  # half a character by its own name
    assert token_text(tokenizer, tokenizer("a").input_ids[0]) == "a"
    llama = load_tokenizer(real / "models" / "stories260K")
    ids = llama("Once upon a time", add_special_tokens=False).input_ids
    assert "".join(token_text(llama, token) for token in ids) == " Once upon a time"
