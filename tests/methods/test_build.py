"""Methods by name: the config's list is that of the classes, and what is asked for is what is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from featcl import config
from featcl.errors import FeatclError
from featcl.methods.build import METHODS, Sources, build_methods, parameters_of, plain_text
from featcl.methods.corda import CorDA
from featcl.methods.ewc import EWC
from featcl.methods.method import Method
from featcl.methods.rehearsal import Rehearsal
from featcl.streams import Trajectory

TALK = Trajectory("a", messages=({"role": "user", "content": "who?"}, {"role": "assistant", "content": "me."}))
TEXT = Trajectory("b", text="some text")
SOURCES = Sources({"instructions": (TALK,), "pretraining": (TEXT,), "none": ()})


def test_config_and_classes_agree() -> None:
    assert list(config.METHODS) == list(METHODS)
    assert {name: tuple(parameters_of(name)) for name in METHODS} == config.METHODS
    assert {name: kind.name for name, kind in METHODS.items()} == {name: name for name in METHODS}


def test_every_method_of_the_package_has_a_name_here() -> None:
    import importlib
    import pkgutil

    import featcl.methods

    found: set[type[Method]] = set()
    for module in pkgutil.iter_modules(featcl.methods.__path__):
        kinds = vars(importlib.import_module(f"featcl.methods.{module.name}")).values()
        found |= {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Method)}
    named = {kind for kind in found if "name" in vars(kind) and kind.name not in ("none", "outside")}
    assert named == set(METHODS.values())


def test_options_reach_the_class() -> None:
    [ewc, plain] = build_methods([{"name": "ewc", "variant": "online", "decay": 0.5}, "si"])
    assert isinstance(ewc, EWC)
    assert (ewc.variant, ewc.decay) == ("online", 0.5)
    assert plain.name == "si"


def test_material_by_name_and_by_file(tmp_path: Path) -> None:
    file = tmp_path / "more.txt"
    file.write_text("and more\n")
    [rehearsal] = build_methods([{"name": "rehearsal", "material": ["instructions", str(file)]}], SOURCES)
    assert isinstance(rehearsal, Rehearsal)
    assert [plain_text(each).strip() for each in rehearsal.material] == ["who?\nme.", "and more"]
    [corda] = build_methods([{"name": "corda", "retained": "pretraining"}], SOURCES)
    assert isinstance(corda, CorDA)
    assert corda.retained == ("some text",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ewcc", "unknown method 'ewcc'; did you mean 'ewc'?"),
        ({"name": "ewc", "strenght": 1.0}, "method ewc has no parameter 'strenght'; did you mean 'strength'?"),
        ({"name": "mica", "rank": 1}, "method mica has no parameter 'rank'; there is none"),
        ("rehearsal", "rehearsal: material is missing; give instructions, pretraining, none, a file"),
        ({"name": "rehearsal", "material": None}, "rehearsal: material is missing"),
        ({"name": "rehearsal", "material": "none"}, "rehearsal: material: this stream brings no none with it"),
        ({"name": "rehearsal", "material": []}, "rehearsal: material is []; give"),
        ({"name": "persona", "answers": "no.jsonl"}, "persona: answers: there is no file 'no.jsonl'"),
        ({"name": "ewc", "strength": "big"}, "ewc: strength must be a positive number, not 'big'"),
        (
            {"name": "replay", "budget": 4, "select": {"name": "importance", "score": "los"}},
            "importance: score 'los' is not available",
        ),
    ],
)
def test_one_clear_line(spec: object, message: str) -> None:
    with pytest.raises(FeatclError) as caught:
        build_methods([spec], SOURCES)  # type: ignore[list-item]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
