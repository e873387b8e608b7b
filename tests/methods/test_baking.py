"""Periodic baking: nothing between two bakings, all together in one."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.baking import Baking
from tests.methods.replaying import Bench, ask, resumes
from tests.methods.test_replay import Watch, gradients


def test_weights_stand_still_between_bakings_and_then_learn_from_all() -> None:
    bench, method, watch = Bench(), Baking(every=3), Watch()
    start = bench.adapter.coordinates()
    reasons = [bench.observe(ask(1), method, watch), bench.observe(ask(2), method, watch, weight=0.5)]
    assert reasons == ["baking: 1 of 3 collected", "baking: 2 of 3 collected"]
    assert all(torch.equal(start[name], now) for name, now in bench.adapter.coordinates().items())
    expected = gradients(bench, (ask(3), 1.0), (ask(1), 1.0), (ask(2), 0.5))
    assert bench.observe(ask(3), method, watch) is None
    for name in expected:
        torch.testing.assert_close(watch.seen[name], expected[name], atol=1e-6, rtol=1e-5)
    assert not all(torch.equal(start[name], now) for name, now in bench.adapter.coordinates().items())
    assert method.waiting == ()


def test_what_is_left_at_the_end_of_a_task_can_be_baked() -> None:
    bench, method = Bench(), Baking(every=5)
    for number in range(3):
        bench.observe(ask(number), method)
    assert [each.trajectory.id for each in method.flush_(bench.view())] == ["t0", "t1", "t2"]
    assert method.cost().stored_bytes > 0


def test_every_one_is_plain_learning() -> None:
    plain, baked = Bench(), Bench()
    method = Baking(every=1)
    for number in range(3):
        plain.observe(ask(number))
        assert baked.observe(ask(number), method) is None
    found, expected = baked.adapter.coordinates(), plain.adapter.coordinates()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_baking_resumes_to_the_same_bits() -> None:
    assert resumes(lambda: Baking(every=3), [ask(n) for n in range(8)], cut=5)
    with pytest.raises(FeatclError, match="every must be"):
        Baking(every=0)
