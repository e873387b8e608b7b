"""The meter against torch's own counter over real training steps, a cached trunk and ended passes; memory and disk."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from featcl.adapters import constrain, resumed, run_trunk
from featcl.config import ConfigError, EvaluationConfig, RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.cost import Cost, CostMeter, peaks, reset_peaks, stored_bytes
from featcl.evaluation.flops import Flops
from featcl.models import residual_stream
from tests.adapters.conftest import VOCAB, build_directions, build_model


def adapted(kind: str = "both", layer: int = 3) -> Any:
    model = build_model("olmo2")
    model.set_attn_implementation("eager")  # torch's counter knows no fused kernel of a CPU
    return constrain(model, build_directions(layer=layer), kind=kind)


def tokens(batch: int = 2, seq: int = 9) -> torch.Tensor:
    return torch.arange(batch * seq).reshape(batch, seq) * 5 % VOCAB


def without_angles(counter: FlopCounterMode) -> int:
    """What torch executed; in a nested module's name the rotary embedding is counted once."""
    angles = [found for name, found in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(each.values()) for each in angles)


def step(adapter: Any, ids: torch.Tensor) -> None:
    adapter.model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()


@pytest.mark.parametrize("kind", ["none", "both", "residual", "shift", "full"])
def test_training_steps_cost_what_torch_counts(kind: str) -> None:
    adapter = adapted(kind)
    with CostMeter(adapter.model) as meter, FlopCounterMode(display=False) as counter:
        with meter.phase("learning"):
            step(adapter, tokens())
            step(adapter, tokens(3, 5))
        with meter.phase("evaluation"), torch.no_grad():
            adapter.model(input_ids=tokens(), use_cache=False)
    assert meter.total.flops.total == without_angles(counter)
    learning, evaluation = meter.costs["learning"], meter.costs["evaluation"]
    assert (learning.tokens, learning.passes) == (33, 2)
    assert (evaluation.tokens, evaluation.passes) == (18, 1)
    assert learning.flops.backward > 0 == evaluation.flops.backward


def test_a_pass_without_a_backward_pass_costs_its_forward_alone() -> None:
    adapter = adapted()
    with CostMeter(adapter.model) as meter, meter.phase("learning"):
        logits = adapter.model(input_ids=tokens(), use_cache=False).logits
        assert meter.costs["learning"].flops.backward == 0
        logits.sum().backward()
    assert meter.costs["learning"].flops.backward > 0


def test_what_is_outside_a_phase_or_after_the_meter_is_not_counted() -> None:
    adapter = adapted()
    with CostMeter(adapter.model) as meter:
        step(adapter, tokens())
        assert meter.costs == {}
        with meter.phase("learning"):
            step(adapter, tokens())
    before = meter.total
    step(adapter, tokens())
    assert meter.total == before
    assert not adapter.model.get_base_model().base_model._forward_hooks


def test_a_cached_trunk_is_paid_once() -> None:
    adapter = adapted(layer=3)
    assert adapter.lowest_layer == 2
    with CostMeter(adapter.model) as meter, FlopCounterMode(display=False) as counter, meter.phase("learning"):
        state = run_trunk(adapter.model, tokens(), layer=adapter.lowest_layer)
        for _ in range(3):
            with resumed(adapter.model, state):
                step(adapter, tokens())
    assert meter.total.flops.total == without_angles(counter)
    with CostMeter(adapter.model) as plain, plain.phase("learning"):  # control: without the cache it is dearer
        for _ in range(3):
            step(adapter, tokens())
    assert plain.total.flops.forward > meter.total.flops.forward
    assert plain.total.flops.backward == meter.total.flops.backward


@pytest.mark.parametrize("layer", [0, 2])
def test_a_pass_that_is_ended_at_a_hook_costs_what_it_ran(layer: int) -> None:
    adapter = adapted()
    with CostMeter(adapter.model) as meter, FlopCounterMode(display=False) as counter, meter.phase("reading"):
        residual_stream(adapter.model, tokens(), layer=layer)
    assert meter.total.flops.total == without_angles(counter) > 0


def test_a_pass_that_fails_costs_nothing_and_leaves_the_meter_in_order() -> None:
    adapter = adapted()
    with CostMeter(adapter.model) as meter, meter.phase("learning"):
        with pytest.raises((IndexError, RuntimeError)):
            adapter.model(input_ids=torch.tensor([[VOCAB + 5]]), use_cache=False)
        with torch.no_grad():
            adapter.model(input_ids=tokens(), use_cache=False)
    assert meter.total.passes == 1


def test_generation_counts_every_new_token_with_its_cache() -> None:
    adapter = adapted()
    with CostMeter(adapter.model) as meter, FlopCounterMode(display=False) as counter, meter.phase("acting"):
        adapter.model.generate(input_ids=tokens(1, 6), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert meter.total.passes == 4
    assert meter.total.flops.total == without_angles(counter)


def test_phases_do_not_nest() -> None:
    meter = CostMeter(adapted().model)
    with pytest.raises(FeatclError, match="phase 'b' begins inside phase 'a'"), meter.phase("a"), meter.phase("b"):
        pass
    with meter.phase("b"):  # and it is still usable
        pass


def test_a_phase_has_its_own_peak_of_memory() -> None:
    meter, size = CostMeter(adapted().model), 64 << 20
    with meter.phase("large"):
        block = torch.ones(size, dtype=torch.uint8)
        del block
    with meter.phase("small"):
        pass
    large, small = meter.costs["large"], meter.costs["small"]
    if not large.peak_is_of_phase:
        pytest.skip("this system cannot reset the peak of a process's resident memory")
    assert large.peak_rss_bytes - small.peak_rss_bytes > 0.8 * size
    assert meter.total.peak_rss_bytes == large.peak_rss_bytes
    assert large.peak_cuda_bytes == 0
    assert meter.total.seconds == pytest.approx(large.seconds + small.seconds)


def test_where_the_peak_cannot_be_reset_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from featcl.evaluation import cost

    monkeypatch.setattr(cost, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(cost, "STATUS", tmp_path / "none" / "status")
    assert reset_peaks() is False
    rss, _ = peaks()
    assert rss > 1 << 20  # since the process started
    meter = CostMeter(adapted().model)
    with meter.phase("any"):
        pass
    assert not meter.costs["any"].peak_is_of_phase
    assert not meter.total.peak_is_of_phase


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_peak_of_a_gpu() -> None:
    adapter = adapted()
    adapter.model.to("cuda")
    meter = CostMeter(adapter.model)
    with meter.phase("large"):
        torch.ones(32 << 20, dtype=torch.uint8, device="cuda")
    with meter.phase("small"):
        pass
    assert meter.costs["large"].peak_cuda_bytes - meter.costs["small"].peak_cuda_bytes >= 32 << 20


def test_costs_are_saved_and_gone_on_from() -> None:
    cost = Cost(tokens=3, passes=1, flops=Flops(10, 20, 5), seconds=0.5, peak_rss_bytes=7, stored_bytes=9)
    again = Cost.from_dict(json.loads(json.dumps(cost.to_dict())))
    assert again == cost
    meter = CostMeter(adapted().model, costs={"learning": again})
    with meter.phase("learning"):
        pass
    assert meter.costs["learning"].flops == cost.flops
    assert meter.costs["learning"].seconds > cost.seconds
    assert cost + cost == Cost(6, 2, Flops(20, 40, 10), 1.0, 7, True, 0, 18)
    for wrong in ({}, {"flops": {}, "token": 1}):
        with pytest.raises(FeatclError, match="no cost that was saved"):
            Cost.from_dict(wrong)


def test_the_record_repeats_itself_and_holds_no_time() -> None:
    records = []
    for _ in range(2):
        adapter = adapted()
        with CostMeter(adapter.model) as meter, meter.phase("learning"):
            step(adapter, tokens())
        records.append(meter.total.record())
    assert records[0] == records[1]
    assert not any("second" in name or "rss" in name for name in records[0])


def test_stored_bytes_by_name(tmp_path: Any) -> None:
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "a").write_bytes(b"12345")
    (tmp_path / "adapter" / "deep" / "b").write_bytes(b"123")
    (tmp_path / "R.json").write_bytes(b"{}")
    assert stored_bytes(tmp_path) == {"R.json": 2, "adapter": 8}
    with pytest.raises(FeatclError, match="is no folder"):
        stored_bytes(tmp_path / "R.json")


def test_what_is_off_by_default_changes_no_config() -> None:
    plain = RunConfig().to_dict()["evaluation"]
    assert plain == {"suites": ["lab/general"], "every": "task", "canaries": {"every": 25, "items": 64}}
    asked = RunConfig.from_dict({"evaluation": {"cost": True, "drift": {}, "shift": {"segments": 4}, "harness": {},
                                                "perplexity": {"files": ["a.txt"]}}})  # fmt: skip
    assert asked.digest != RunConfig().digest
    assert RunConfig.from_dict(asked.to_dict()) == asked
    assert isinstance(asked.evaluation, EvaluationConfig)
    with pytest.raises(ConfigError, match=r"evaluation\.perplexity\.files"):
        RunConfig.from_dict({"evaluation": {"perplexity": {}}})
    with pytest.raises(ConfigError, match=r"unknown key, did you mean 'segments'"):
        RunConfig.from_dict({"evaluation": {"shift": {"segmens": 4}}})
