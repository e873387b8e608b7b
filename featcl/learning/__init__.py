"""The online learner."""

from featcl.learning.learner import Learner
from featcl.learning.stats import UpdateStats

__all__ = ["Learner", "UpdateStats"]
