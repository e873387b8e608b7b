"""Slow weights that a config's `memory.path` names: taken as they were saved, or refused."""

from __future__ import annotations

import json

import pytest
import torch

from featcl.build.memory import _load_weights_
from featcl.errors import FeatclError
from featcl.memory.saved import MANIFEST, WEIGHTS
from tests.adapters.conftest import build_model
from tests.memory.attaching import attached_to, logits, text
from tests.memory.test_attach_features import features_on


@pytest.mark.parametrize("kind", ["free", "features"])
def test_they_come_back_and_damage_is_refused(tmp_path, kind):
    made = {"free": lambda shut: attached_to("olmo2", shut=shut), "features": lambda shut: features_on(shut=shut)}[kind]
    trained, fresh = made(False), made(True)
    trained.save(tmp_path)
    before = logits(fresh.model, text())
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(FeatclError, match=r"memory\.path: .*memory.safetensors does not match its digest"):
        _load_weights_(fresh, tmp_path)
    assert torch.equal(logits(fresh.model, text()), before)
    (tmp_path / WEIGHTS).write_bytes(whole)
    _load_weights_(fresh, tmp_path)
    assert torch.equal(logits(fresh.model, text()), logits(trained.model, text()))
    assert not torch.equal(logits(fresh.model, text()), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: attached_to("llama"), "has family olmo2, here llama: set memory to what it was trained as"),
        (lambda: attached_to("olmo2", layer=2), "has layer 1, here 2"),
        (lambda: attached_to("olmo2", "layer"), "has form gate, here layer"),
        (lambda: attached_to("olmo2", depth=2), "has depth 1, here 2"),
        (lambda: features_on(), "has layer 1, here 2"),
    ],
)
def test_those_of_another_memory_are_refused(tmp_path, other, message):
    attached_to("olmo2").save(tmp_path)
    attached = other()
    before = attached.tensors()
    with pytest.raises(FeatclError, match=message):
        _load_weights_(attached, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in attached.tensors().items())


def test_a_folder_without_them_is_refused(tmp_path):
    attached = attached_to(model=build_model("olmo2"))
    with pytest.raises(FeatclError, match=r"memory\.path: .* holds no saved memory"):
        _load_weights_(attached, tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1}))
    with pytest.raises(FeatclError, match=r"memory\.path: .* holds no saved memory"):
        _load_weights_(attached, tmp_path)
