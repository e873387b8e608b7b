"""The constrained LoRA: what an update may write and react to, exactly."""

from featcl.adapters.adapter import ConstrainedAdapter
from featcl.adapters.constrain import constrain
from featcl.adapters.leak import LeakReport, SiteLeak
from featcl.adapters.report import FeatureReport, FeatureRow

__all__ = ["ConstrainedAdapter", "FeatureReport", "FeatureRow", "LeakReport", "SiteLeak", "constrain"]
