"""Is general ability kept? The columns of R that are neither tasks nor probes that may change."""

from __future__ import annotations

import math

import numpy as np

from featcl.evaluation.desiderata.card import Desideratum
from featcl.evaluation.desiderata.evidence import Evidence, number_of
from featcl.evaluation.desiderata.sheet import Sheet
from featcl.evaluation.intervals import wilson
from featcl.evaluation.metrics import FORMULAS, known_mean
from featcl.evaluation.paired import compare_items

KL = "canary/kl_general"
BITS = "_bits_per_byte"


def preserve(evidence: Evidence) -> Desideratum:
    """General ability before and after, in scores, in items, and in distance from the base model."""
    sheet = Sheet("preserve", evidence)
    general = evidence.general
    if general:
        sheet.of_row("general_final", "mean over general columns of R[T, g]",
                     lambda scores, base: known_mean(scores[..., general]))  # fmt: skip
        sheet.of_row("general_change", FORMULAS["general_change"],
                     lambda scores, base: known_mean((scores - base)[..., general]), note=_test(evidence))  # fmt: skip
        sheet.of_row("worst_general_change", "least over general columns of R[T, g] - R[0, g]",
                     lambda scores, base: _least((scores - base)[..., general]))  # fmt: skip
        _add_lost(sheet)
    else:
        sheet.lacks(["general_final", "general_change", "worst_general_change", "general_right_to_wrong"],
                    "R has no column of general ability; name suites in evaluation.suites")  # fmt: skip
    readings = [record[KL] for record in evidence.run.records if record.get(KL) is not None]
    sheet.count("kl_to_base", "KL(base ‖ model) on the general canaries, at their last reading",
                readings[-1] if readings else None, unit="nats per token", references={"base": 0.0},
                note="a reading of a fixed set, so without an interval",
                why=f"no canaries were read ({KL} in metrics.jsonl); set evaluation.canaries")  # fmt: skip
    _add_perplexity(sheet)
    return sheet.done()


def _add_lost(sheet: Sheet) -> None:
    """Of the general items that the base model has right, the share that is wrong at the end."""
    if not sheet.evidence.graded:
        sheet.lacks(["general_right_to_wrong"], "items are not right or wrong")
        return
    before, after = _items(sheet.evidence)
    right = (before == 1) & ~np.isnan(after)
    sheet.put("general_right_to_wrong", "of the general items that the base has right, the share wrong at the end",
              wilson(int((after[right] == 0).sum()), int(right.sum())), references={"base": 0.0},
              why="the base model has no general item right")  # fmt: skip


def _add_perplexity(sheet: Sheet) -> None:
    """Bits per byte of frozen text, at the last evaluation against the first."""
    readings: dict[str, list[float]] = {}
    for record in sheet.evidence.run.records:
        for name in record if record.get("kind") == "evaluation" else ():
            if name.endswith(BITS):
                readings.setdefault(name.rpartition("/")[2].removesuffix(BITS), []).append(number_of(record[name]))
    for text, bits in readings.items():
        sheet.count(f"bits_per_byte_change/{text}", "bits per byte of frozen text, last - first; positive = worse",
                    bits[-1] - bits[0], unit="bits per byte", references={"base": 0.0},
                    note="one text, so without an interval")  # fmt: skip
    if not readings:
        sheet.lacks(["bits_per_byte_change"], f"no frozen text was read (general/<text>{BITS} in metrics.jsonl)")


def _test(evidence: Evidence) -> str:
    """What the exact test of the flips says, in words."""
    if not evidence.graded:
        return ""
    found = compare_items(*_items(evidence), resamples=1)
    if math.isnan(found.p_value):
        return ""
    return f"{found.right_to_wrong} items lost, {found.wrong_to_right} won: exact McNemar p = {found.p_value:.2g}"


def _items(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Every general item in the base model and at the end."""
    matrix = evidence.run.matrix
    arrays = [matrix.scores(matrix.columns[column]).array for column in evidence.general]
    return np.concatenate([array[0] for array in arrays]), np.concatenate([array[-1] for array in arrays])


def _least(values: np.ndarray) -> np.ndarray:
    """Smallest of what is known along the last axis."""
    least = np.where(np.isnan(values), np.inf, values).min(axis=-1)
    return np.where(np.isinf(least), np.nan, least)
