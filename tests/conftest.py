"""Shared fixtures: tiny random models of three families, a byte-level tokenizer, and real material where present."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
os.environ.setdefault("CI", "1")

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("olmo2", "gemma2", "llama")

_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if SYSTEM %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real() -> Path:
    """Models, texts and trajectories that this project did not make: FEATCL_REAL, default ../shared/real."""
    folder = Path(os.environ.get("FEATCL_REAL") or ROOT.parent / "shared" / "real")
    if not folder.is_dir():
        pytest.skip(f"real material not found at {folder}; set FEATCL_REAL to its folder")
    return folder


def tiny_tokenizer(family: str = "olmo2") -> Any:
    """Byte-level BPE without merges and a chat template; Gemma's refuses a system turn, Llama has no template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    if family != "llama":
        refuses = "m['role'] == 'system'" if family == "gemma2" else "false"
        tokenizer.chat_template = _CHAT.replace("SYSTEM", refuses)
    return tokenizer


def tiny_model(family: str = "olmo2", *, n_layers: int = 3, d_model: int = 32, seed: int = 0) -> Any:
    """A random model of a few thousand parameters whose norm gains are log-normal, so that folding them matters."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Olmo2Config,
        Olmo2ForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": 256 + len(_SPECIAL),
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    gemma = {"head_dim": d_model // 4, "query_pre_attn_scalar": d_model // 4, "sliding_window": 64}
    classes = {
        "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**shape)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**shape, **gemma)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classes[family]().eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                gain = torch.exp(0.4 * torch.randn_like(parameter))
                parameter.data = gain - 1 if family == "gemma2" else gain
            elif parameter.ndim == 2:
                parameter.data = 0.15 * torch.randn_like(parameter)
    return model.requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Runs the test once per family."""
    return request.param


@pytest.fixture
def tiny() -> Callable[..., tuple[Any, Any]]:
    """`tiny("gemma2", n_layers=2)` -> (model, tokenizer), fresh at every call."""

    def build(family: str = "olmo2", **shape: Any) -> tuple[Any, Any]:
        return tiny_model(family, **shape), tiny_tokenizer(family)

    return build


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_folder("olmo2")` -> a Hugging Face folder with that model and its tokenizer."""

    def build(family: str = "olmo2", **shape: Any) -> Path:
        folder = tmp_path / f"tiny-{family}"
        tiny_model(family, **shape).save_pretrained(folder)
        tiny_tokenizer(family).save_pretrained(folder)
        return folder

    return build
