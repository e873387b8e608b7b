"""A skill file: rules from feedback, counted, bounded, in front of the prompt."""

from __future__ import annotations

import pytest

from featcl.errors import FeatclError
from featcl.methods.skill_file import Rule, SkillFile
from featcl.streams import Trajectory
from tests.methods.replaying import Bench, ask, resumes
from tests.methods.test_in_context import ASKED, system_of


def told(number: int, feedback: str | None = None, **fields: object) -> Trajectory:
    return ask(number, feedback=feedback, **fields)


def seen(method: SkillFile, *trajectories: Trajectory) -> SkillFile:
    bench = Bench()
    for trajectory in trajectories:
        bench.observe(trajectory, method)
    return method


def test_feedback_becomes_rules_and_confirms_them() -> None:
    method = seen(
        SkillFile(),
        told(1, "Say please. Be short!"),
        told(2, "be short!"),
        told(3),
        told(4, meta={"context": "mira plays golf."}),
    )
    assert method.rules == (Rule("Say please."), Rule("Be short!", helpful=1), Rule("mira plays golf."))
    assert method.file == "- [+0 -0] Say please.\n- [+1 -0] Be short!\n- [+0 -0] mira plays golf.\n"


def test_rewards_count_for_the_rules_in_play() -> None:
    rules = told(1, "Call numbers it. Speak of the weather.")
    good, bad = told(2, reward=1.0), told(3, "odd", reward=-1.0)
    said = (
        {"role": "user", "content": "what do numbers call?"},
        {"role": "assistant", "content": "they call it it"},
    )
    method = seen(
        SkillFile(), rules, told(5, reward=2.0, messages=said), told(6, reward=-1.0, messages=said), good, bad
    )
    assert method.rules[0] == Rule("Call numbers it.", helpful=1, harmful=1)
    assert method.rules[1] == Rule("Speak of the weather.")  # negative control: not in play
    assert seen(SkillFile(), rules, told(5, reward=0.0, messages=said)).rules[0] == Rule("Call numbers it.")


def test_the_budget_is_kept_to_the_byte_and_the_worst_goes() -> None:
    method = SkillFile(budget_bytes=45)
    seen(method, told(1, "rule a."), told(2, "rule b."), told(3, "rule a."))
    assert len(method.file.encode()) == 2 * len("- [+0 -0] rule a.\n") <= 45
    seen(method, told(4, "rule c."))
    assert [rule.text for rule in method.rules] == [
        "rule a.",
        "rule c.",
    ]  # b is older than c, a was confirmed
    assert method.cost().stored_bytes == len(method.file.encode()) <= 45
    with pytest.raises(FeatclError, match="budget is 45"):
        seen(method, told(5, "x" * 60))
    with pytest.raises(FeatclError, match="budget_bytes must be"):
        SkillFile(budget_bytes=0)


def test_the_file_is_read_before_every_prompt() -> None:
    bench, method = Bench(), SkillFile()
    assert method.context(ASKED, bench.view()) is ASKED
    for trajectory in (told(1, "rule a."), told(2, "rule b."), told(3, "rule a.")):
        assert bench.observe(trajectory, method) == "skill_file: kept outside the weights"
    assert system_of(method.context(ASKED, bench.view())) == "rule b.\nrule a."


def test_the_model_can_write_the_rule() -> None:
    bench, method = Bench(), SkillFile(writer="model", max_new_tokens=12)
    bench.observe(told(1, "be short."), method)
    written = [rule.text for rule in method.rules]
    assert written != ["be short."]
    assert method.cost().forward_tokens > 12
    again = SkillFile(writer="model", max_new_tokens=12)
    Bench().observe(told(1, "be short."), again)
    assert [rule.text for rule in again.rules] == written


def test_a_skill_file_resumes_to_the_same_bits() -> None:
    stream = [told(n, f"rule {n % 3}. more {n}.", reward=(-1.0) ** n) for n in range(7)]
    assert resumes(lambda: SkillFile(frozen=False, budget_bytes=90), stream, cut=4)
    with pytest.raises(FeatclError, match="writer 'me'"):
        SkillFile(writer="me")
