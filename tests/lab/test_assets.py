"""The shipped models as reloaded from bfloat16: what `featcl lab check` claims that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors import safe_open

from featcl.evaluation import ItemScorer
from featcl.lab.items import Item
from featcl.lab.streams import load_stream
from featcl.lab.suites import load_suite
from featcl.lab.training import FAMILIES, gain_spread
from featcl.models import LAB_ASSETS, load_model
from featcl.streams import Chat


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str) -> tuple[Any, Chat]:
    model, tokenizer = load_model(f"lab/{family}")
    return model, Chat(tokenizer)


def accuracy(model: Any, chat: Chat, items: Sequence[Item]) -> float:
    right = ItemScorer(chat, items).score(model)
    return sum(right) / len(right)


def items_of(world: str) -> dict[str, tuple[Item, ...]]:
    streams = [load_stream(name, world=world) for name in ("lab/applications", "lab/labels")]
    return {task.name: task.items for stream in streams for task in stream.tasks}


def test_assets_are_small_and_stored_in_bfloat16(family: str) -> None:
    assert sum(file.stat().st_size for file in LAB_ASSETS.rglob("*") if file.is_file()) <= 25_000_000
    for folder in (LAB_ASSETS / family, LAB_ASSETS / family / "teacher"):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_norm_gains_are_spread(family: str, base: tuple[Any, Chat]) -> None:
    assert gain_spread(base[0], offset=1.0 if family == "gemma2" else 0.0) >= 0.25


def test_the_base_can_do_the_general_suite(base: tuple[Any, Chat]) -> None:
    assert accuracy(*base, load_suite()) >= 0.90


@pytest.mark.parametrize("world", ["development", "unseen"])
def test_the_base_cannot_do_the_tasks_and_the_teacher_can(family: str, world: str, base: tuple[Any, Chat]) -> None:
    teacher, _ = load_model(f"lab/{family}/teacher")
    for name, items in items_of(world).items():
        assert accuracy(*base, items) <= 0.15, name
        assert accuracy(teacher, base[1], items) >= 0.90, name


def test_a_model_with_shuffled_weights_can_do_nothing(family: str, base: tuple[Any, Chat]) -> None:
    model, _ = load_model(f"lab/{family}")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    assert accuracy(model, base[1], load_suite()) <= 0.05
