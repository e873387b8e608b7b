"""Losses on a batch of tokens."""

from featcl.objectives.build import build_terms
from featcl.objectives.divergence import kl_divergence

__all__ = ["build_terms", "kl_divergence"]
