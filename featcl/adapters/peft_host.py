"""PEFT's side: adding, deleting and switching LoRA layers without unfreezing what must stay frozen.

PEFT turns `requires_grad` on for every LoRA tensor of an adapter that becomes active, so each of these functions puts
the flags back as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import LoraConfig

FACTORS = ("lora_A", "lora_B")


def sides(role: str) -> tuple[str, str]:
    """The factor that lies in the span, and the free one."""
    return ("lora_B", "lora_A") if role == "write" else ("lora_A", "lora_B")


def kept_name(adapter: str) -> str:
    """What PEFT calls the second, frozen LoRA of an adapter."""
    return f"{adapter}_kept"


def lora_config(names: Sequence[str], rank: int, *, alpha: float | None = None) -> LoraConfig:
    """A plain LoRA of one rank, with unit scaling unless alpha says otherwise, on exactly these modules."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # any number works
        target_modules=sorted(names),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def inject(model: Any, host: Any, name: str, config: LoraConfig, *, seed: int) -> Any:
    """Add a PEFT adapter beside those that are there; all are active.

    Args:
        model: The Hugging Face model.
        host: The PeftModel around it, or None where there is none yet.
        name: Of the new adapter in PEFT.
        config: Its modules and rank.
        seed: Of PEFT's initialisation.

    Returns:
        The PeftModel.
    """
    from peft import get_peft_model

    flags = _flags(lora_modules(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if host is None:
            host = get_peft_model(model, config, adapter_name=name)
        else:
            host.add_adapter(name, config)
    _activate_(host, list(host.peft_config), flags)
    return host


def eject(host: Any, name: str) -> None:
    """Delete one PEFT adapter; the others stay active."""
    flags = _flags(lora_modules(host))
    host.delete_adapter(name)
    _activate_(host, list(host.peft_config), flags)


def _activate_(host: Any, names: list[str], flags: Sequence[tuple[Tensor, bool]]) -> None:
    host.base_model.set_adapter(names)
    if names:
        host.active_adapter = names[0]
    _set_flags_(flags)


def lora_modules(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers in a model."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def switched_off(modules: Sequence[Any], names: Sequence[str]) -> Iterator[None]:
    """These adapters inactive in these LoRA layers inside the block, others as they are; may be nested."""
    before = [(module, list(module.active_adapters)) for module in modules]
    flags = _flags(modules)
    try:
        for module, active in before:
            module.set_adapter([name for name in active if name not in names])
        _set_flags_(flags)
        yield
    finally:
        for module, active in before:
            module.set_adapter(active)
        _set_flags_(flags)


def _flags(modules: Sequence[Any]) -> list[tuple[Tensor, bool]]:
    """Every LoRA tensor with whether it is trained."""
    return [
        (tensor, tensor.requires_grad)
        for module in modules
        for which in FACTORS
        for tensor in getattr(module, which).parameters()
    ]


def _set_flags_(flags: Sequence[tuple[Tensor, bool]]) -> None:
    for tensor, flag in flags:
        tensor.requires_grad_(flag)
