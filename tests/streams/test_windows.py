"""Long episodes: every target once, nothing longer than the context, an honest count of what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcl.errors import FeatclError
from featcl.streams import Chat, Encoded, Trajectory, encode_trajectory, read_trajectories
from featcl.streams.windows import cut_windows


def episode(length: int, targets: range) -> Encoded:
    return Encoded(list(range(length)), [place in targets for place in range(length)])


def test_a_short_episode_is_one_window() -> None:
    whole = episode(16, range(4, 9))
    assert cut_windows(whole, max_length=16) == ([whole], 0)


@pytest.mark.parametrize("start", [None, 0])
def test_every_target_is_learned_once_and_has_context(start: int | None) -> None:
    windows, left_out = cut_windows(episode(1000, range(10, 1000)), max_length=64, start=start)
    assert left_out == 0
    assert max(map(len, windows)) == 64
    seen = [t for window in windows for t, m in zip(window.input_ids, window.loss_mask, strict=True) if m]
    assert seen == list(range(10, 1000))
    assert all((window.input_ids[0] == 0) == (start == 0) for window in windows[1:])
    assert not any(window.loss_mask[0] for window in windows)
    assert all(sum(window.loss_mask[:16]) == 0 for window in windows[1:-1]), "a quarter is context"


def test_windows_without_targets_are_left_out_and_counted() -> None:
    windows, left_out = cut_windows(episode(1000, range(700, 710)), max_length=100)
    assert len(windows) == 1
    assert left_out == 1000 - 100
    windows, left_out = cut_windows(episode(1000, range(1, 1000)), max_length=100, max_windows=3)
    assert [len(windows), windows[0].input_ids[0], windows[-1].input_ids[-1]] == [3, 0, 999]
    assert left_out == 1000 - len({token for window in windows for token in window.input_ids})


def test_a_context_too_short_is_refused() -> None:
    with pytest.raises(FeatclError, match="at least 8"):
        cut_windows(episode(9, range(3, 4)), max_length=7)


def test_real_trajectories_in_a_real_context(real: Path) -> None:
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(real / "models/stories260K"))
    path = real / "trajectories/tau_bench_airline_trials_0_1.jsonl.gz"
    for trajectory, _ in zip(read_trajectories(path), range(3), strict=False):
        whole = chat.encode(trajectory.messages)
        windows, left_out = encode_trajectory(trajectory, chat, max_length=512)
        assert len(whole) > 512
        assert max(map(len, windows)) <= 512
        assert all(window.input_ids[0] == chat.tokenizer.bos_token_id for window in windows)
        assert sum(sum(window.loss_mask) for window in windows) == sum(whole.loss_mask)
        few, more_left_out = encode_trajectory(trajectory, chat, max_length=512, max_windows=2)
        assert len(few) == 2
        assert more_left_out > left_out


def test_text_is_learned_whole(real: Path) -> None:
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(real / "models/stories260K"))
    (window,), left_out = encode_trajectory(Trajectory("t", text="Once upon a time"), chat, max_length=64)
    assert (window.loss_mask, left_out) == ([False] + [True] * (len(window) - 1), 0)
    assert chat.tokenizer.decode(window.input_ids[1:]) == "Once upon a time"
    with pytest.raises(FeatclError, match="trajectory 'q': no token to learn from"):
        encode_trajectory(Trajectory("q", messages=({"role": "user", "content": "?"},)), chat, max_length=64)
