"""An attached memory as a folder: what comes back says the same, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from featcl.errors import FeatclError
from featcl.memory import load_memory
from featcl.memory.attach import memories_of
from featcl.memory.saved import MANIFEST, STATE, USERS, WEIGHTS
from tests.adapters.conftest import build_model
from tests.memory.attaching import FORMS, attached_to, logits, text

SETTINGS = (
    {},
    {"depth": 3, "expansion": 1.5, "head_dim": 6, "conv": 2, "persistent": 2},
    {"momentum": False, "decay": False, "out_gate": False, "max_step": 0.05, "heads": 4},
)


def lived(form="gate", **settings):
    """A memory that has read something, for nobody and for a user."""
    attached = attached_to("olmo2", form, **settings)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with attached.writing():
        logits(attached.model, text())
    with attached.user("Ännä/1"), attached.writing():
        logits(attached.model, text(seed=1))
    return attached


@pytest.mark.parametrize(("form", "settings"), [(FORMS[i], settings) for i, settings in enumerate(SETTINGS)])
def test_what_is_saved_comes_back_bit_equal(tmp_path, form, settings):
    attached = lived(form, **settings)
    attached.save(tmp_path / "one")
    again = load_memory(tmp_path / "one", build_model("olmo2"))
    assert repr(again) == repr(attached)
    assert torch.equal(logits(again.model, text(seed=2)), logits(attached.model, text(seed=2)))
    with again.user("Ännä/1"), attached.user("Ännä/1"):
        assert torch.equal(logits(again.model, text(seed=2)), logits(attached.model, text(seed=2)))
    again.save(tmp_path / "two")
    assert {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()
    }


def test_a_state_that_is_gone_is_gone_from_the_folder(tmp_path):
    attached = lived()
    attached.save(tmp_path)
    attached.state = None
    attached.save(tmp_path)
    assert not (tmp_path / STATE).exists()
    assert load_memory(tmp_path, build_model("olmo2")).state is None


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    lived().save(tmp_path)
    model = build_model("olmo2")
    with pytest.raises(FeatclError, match="attached to olmo2 of width 32, the model is llama of 32"):
        load_memory(tmp_path, build_model("llama"))
    with pytest.raises(FeatclError, match="holds no saved memory"):
        load_memory(tmp_path / "nowhere", model)
    whole = {name: (tmp_path / name).read_bytes() for name in (MANIFEST, WEIGHTS, STATE, USERS)}
    for name in (WEIGHTS, STATE, USERS):
        (tmp_path / name).write_bytes(whole[name][:-8] + bytes(8))
        with pytest.raises(FeatclError, match=f"{name} does not match its digest"):
            load_memory(tmp_path, model)
        (tmp_path / name).write_bytes(whole[name])
    manifest = json.loads(whole[MANIFEST])
    for change, message in (
        ({"format": 9}, "saved in format 9"),
        ({"memory": manifest["memory"] | {"chunk_size": 8}}, "the state's"),
        ({"layer": 7}, "layer 7 is out of range"),
        ({"memory": manifest["memory"] | {"colour": 3}}, "no memory that can be made again: .*colour"),
        ({"memory": manifest["memory"] | {"chunk_size": "8"}}, "chunk_size must be a whole number"),
    ):
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | change))
        with pytest.raises(FeatclError, match=message):
            load_memory(tmp_path, model)
    assert memories_of(model) == []
