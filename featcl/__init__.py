"""featcl: feature-constrained test-time learning.

Public names are imported when first used, so `import featcl` costs little and works without the optional libraries:

    model, tokenizer = featcl.load_model("lab/olmo2")
    sae = featcl.load_sae("lab/olmo2/resid_post_3")
    directions = featcl.select_features(sae, model, tokenizer, selector="contrast", positive=..., negative=..., k=32)
    adapter = featcl.constrain(model, directions, kind="both")
    learner = featcl.Learner(model, tokenizer, adapter, objective="self_distillation")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_NAMES = {
    "FeatclError": "featcl.errors",
    "ConfigError": "featcl.config",
    "RunConfig": "featcl.config",
    "Subspace": "featcl.subspace",
    "load_model": "featcl.models",
    "Trajectory": "featcl.streams",
    "read_trajectories": "featcl.streams",
    "LiveSource": "featcl.streams",
    "as_iterator": "featcl.streams",
    "load_sae": "featcl.features",
    "check_sae": "featcl.features",
    "as_bridge": "featcl.features",
    "select_features": "featcl.features",
    "Directions": "featcl.features",
    "constrain": "featcl.adapters",
    "ConstrainedAdapter": "featcl.adapters",
    "load_adapter": "featcl.adapters",
    "attach_memory": "featcl.memory.attach",
    "AttachedMemory": "featcl.memory.attach",
    "Learner": "featcl.learning",
    "environment_stream": "featcl.learning.acting",
    "document_experiences": "featcl.streams.documents",
    "Reply": "featcl.learning",
    "RunResult": "featcl.evaluation.result",
}
# Rooms reached as attributes. `run` is one of them: the module is callable, so `featcl.run(config)` works.
_MODULES = (
    "adapters", "evaluation", "features", "lab", "learning", "memory", "objectives", "run", "streams", "tracking",
)  # fmt: skip

__all__ = [
    "AttachedMemory",
    "ConfigError",
    "ConstrainedAdapter",
    "Directions",
    "FeatclError",
    "Learner",
    "LiveSource",
    "Reply",
    "RunConfig",
    "RunResult",
    "Subspace",
    "Trajectory",
    "__version__",
    "adapters",
    "as_bridge",
    "as_iterator",
    "attach_memory",
    "check_sae",
    "constrain",
    "document_experiences",
    "environment_stream",
    "evaluation",
    "features",
    "lab",
    "learning",
    "load_adapter",
    "load_model",
    "load_sae",
    "memory",
    "objectives",
    "read_trajectories",
    "run",
    "select_features",
    "streams",
    "tracking",
]

if TYPE_CHECKING:
    from featcl import adapters as adapters
    from featcl import evaluation as evaluation
    from featcl import features as features
    from featcl import lab as lab
    from featcl import learning as learning
    from featcl import memory as memory
    from featcl import objectives as objectives
    from featcl import streams as streams
    from featcl import tracking as tracking
    from featcl.adapters import ConstrainedAdapter as ConstrainedAdapter
    from featcl.adapters import constrain as constrain
    from featcl.adapters import load_adapter as load_adapter
    from featcl.config import ConfigError as ConfigError
    from featcl.config import RunConfig as RunConfig
    from featcl.errors import FeatclError as FeatclError
    from featcl.evaluation.result import RunResult as RunResult
    from featcl.features import Directions as Directions
    from featcl.features import as_bridge as as_bridge
    from featcl.features import check_sae as check_sae
    from featcl.features import load_sae as load_sae
    from featcl.features import select_features as select_features
    from featcl.learning import Learner as Learner
    from featcl.learning import Reply as Reply
    from featcl.learning.acting import environment_stream as environment_stream
    from featcl.memory.attach import AttachedMemory as AttachedMemory
    from featcl.memory.attach import attach_memory as attach_memory
    from featcl.models import load_model as load_model
    from featcl.run import run as run
    from featcl.streams import LiveSource as LiveSource
    from featcl.streams import Trajectory as Trajectory
    from featcl.streams import as_iterator as as_iterator
    from featcl.streams import read_trajectories as read_trajectories
    from featcl.streams.documents import document_experiences as document_experiences
    from featcl.subspace import Subspace as Subspace


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"featcl.{name}")
    raise AttributeError(f"module 'featcl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
