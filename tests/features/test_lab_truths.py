"""In the laboratory the truth is known: selected features are tested against the factors that made the texts."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import featcl
from featcl.features import Directions, random_features
from featcl.features.activations import capture
from featcl.features.hooks import resolve
from featcl.features.tokens import token_batches
from featcl.lab import lexicon as lex
from featcl.lab.corpus import Conversation
from featcl.lab.factors import FACTORS, factor_pairs, marker_words
from featcl.streams import Chat

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

LAYERS = (1, 3)
STYLES = tuple(f"style/{register}" for register in lex.REGISTERS)
DOMAINS = tuple(factor for factor in FACTORS if factor not in STYLES)
CALIBRATION, HELD_OUT = 64, 64  # conversations on each side


@cache
def lab(layer: int = 3) -> tuple[Any, Any, Any]:
    model, tokenizer = featcl.load_model("lab/olmo2")
    return featcl.load_sae(f"lab/olmo2/resid_post_{layer}"), model, tokenizer


def ids_of(conversations: list[Conversation]) -> list[list[int]]:
    chat = Chat(lab()[2])
    return [chat.encode(conversation, mask="none").input_ids for conversation in conversations]


def calibration(factor: str) -> tuple[list[list[int]], list[list[int]]]:
    positive, negative = factor_pairs(factor, CALIBRATION)
    return ids_of(positive), ids_of(negative)


def is_marker(ids: list[int], words: list[str]) -> Tensor:
    """True for every token that holds a part of one of the words in the reply."""
    tokenizer = lab()[2]
    pieces = [tokenizer.decode([token]) for token in ids]
    text = "".join(pieces)
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    starts = ends - torch.tensor([len(piece) for piece in pieces])
    marked = torch.zeros(len(ids), dtype=torch.bool)
    for word in words:
        for match in re.finditer(rf"\b{re.escape(word)}\b", text):
            marked |= (starts < match.end()) & (ends > match.start())
    return marked


def mean_activations(directions: Directions, layer: int, texts: list[list[int]], counted: list[Tensor]) -> Tensor:
    """Mean activation of every chosen feature over the counted tokens of each text."""
    sae, model, tokenizer = lab(layer)
    hook, rows = resolve(model, sae), []
    for text, counts in zip(texts, counted, strict=True):
        [batch] = token_batches([text], tokenizer)
        rows.append(directions.encoder(capture(model, batch, hooks=[hook])[0])[counts].mean(dim=0))
    return torch.stack(rows)


def auc(positive: Tensor, negative: Tensor) -> Tensor:
    """Probability that a positive value exceeds a negative one, per column; a tie counts half."""
    difference = positive[:, None] - negative[None]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean(dim=(0, 1))


def everything(texts: list[list[int]]) -> list[Tensor]:
    return [torch.ones(len(text), dtype=torch.bool) for text in texts]


# --- a style, without the words that name it --------------------------------------------------------------------------


def masked_auc(directions: Directions, layer: int, factor: str, *, extra: tuple[str, ...] = ()) -> float:
    """How well the sum of the chosen features' activations tells held-out texts, marker words not counted."""
    sums = []
    for conversations in factor_pairs(factor, HELD_OUT, held_out=True):
        texts = ids_of(conversations)
        words = [[*marker_words(conversation), *extra] for conversation in conversations]
        counted = [~is_marker(text, these) for text, these in zip(texts, words, strict=True)]
        sums.append(mean_activations(directions, layer, texts, counted).sum(dim=1, keepdim=True))
    return float(auc(*sums))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("factor", STYLES)
def test_a_style_is_told_without_its_marker_words(layer: int, factor: str) -> None:
    """Selected on ordinary texts; opening, form of address and closing word do not count on the held-out ones."""
    positive, negative = calibration(factor)
    sae, model, tokenizer = lab(layer)
    found = featcl.select_features(
        sae, model, tokenizer, selector="contrast", k=32, positive=positive, negative=negative
    )
    assert masked_auc(found, layer, factor) >= 0.95
    controls = [masked_auc(random_features(found, sae, model, seed=seed), layer, factor) for seed in range(4)]
    assert sum(controls) / 4 < 0.85  # single draws reach 0.95: 32 random features know something, too


def without_markers(conversations: list[Conversation]) -> list[list[int]]:
    """The conversations with their marker words cut out of what the model reads."""
    kept = []
    for text, conversation in zip(ids_of(conversations), conversations, strict=True):
        marked = is_marker(text, marker_words(conversation))
        kept.append([token for token, gone in zip(text, marked.tolist(), strict=True) if not gone])
    return kept


@pytest.mark.parametrize("layer", LAYERS)
def test_a_style_is_told_where_the_model_never_reads_its_marker_words(layer: int) -> None:
    """Marker words cut out of the input of the model, on both the calibration and the held-out texts; 8 features."""
    sae, model, tokenizer = lab(layer)
    for factor in STYLES:
        positive, negative = (without_markers(side) for side in factor_pairs(factor, CALIBRATION))
        found = featcl.select_features(
            sae, model, tokenizer, selector="contrast", k=8, positive=positive, negative=negative
        )
        held_out = [without_markers(side) for side in factor_pairs(factor, HELD_OUT, held_out=True)]
        sums = [mean_activations(found, layer, side, everything(side)).sum(dim=1, keepdim=True) for side in held_out]
        assert float(auc(*sums)) >= 0.95, factor


# --- recovering the factors ------------------------------------------------------------------------------------------


def recovery(directions: Directions, layer: int, factor: str) -> float:
    """Mean over the chosen features of how well each alone tells held-out texts with the factor; 0.5 is chance."""
    sides = [ids_of(side) for side in factor_pairs(factor, HELD_OUT, held_out=True)]
    return float(auc(*(mean_activations(directions, layer, side, everything(side)) for side in sides)).mean())


@pytest.mark.parametrize("layer", LAYERS)
def test_contrast_and_attribution_recover_the_factors(layer: int) -> None:
    """Margins over `random_features` of the same k, mean over all factors: contrast 0.40, attribution 0.30."""
    sae, model, tokenizer = lab(layer)
    found: dict[str, list[float]] = {"contrast": [], "attribution": [], "random": []}
    for factor in FACTORS:
        positive, negative = calibration(factor)
        for selector in ("contrast", "attribution"):
            chosen = featcl.select_features(
                sae, model, tokenizer, selector=selector, k=8, positive=positive, negative=negative
            )
            found[selector].append(recovery(chosen, layer, factor))
        found["random"].append(recovery(random_features(chosen, sae, model, seed=len(found["random"])), layer, factor))
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    assert mean["contrast"] >= mean["random"] + 0.40
    assert mean["attribution"] >= mean["random"] + 0.30
    assert abs(mean["random"] - 0.5) < 0.1  # negative control: the measure itself gives nothing away
