"""A memory of fixed size that keeps learning while it is read (Titans, arXiv:2501.00663), and its attachment."""

from featcl.memory.attach import AttachedMemory, attach_memory
from featcl.memory.features import FeatureMemory
from featcl.memory.neural import NeuralMemory
from featcl.memory.recall import Capacity, RecallCurve, capacity, recall_curve
from featcl.memory.saved import load_memory
from featcl.memory.state import MemoryState
from featcl.memory.users import MemoryStates

__all__ = [
    "AttachedMemory",
    "Capacity",
    "FeatureMemory",
    "MemoryState",
    "MemoryStates",
    "NeuralMemory",
    "RecallCurve",
    "attach_memory",
    "capacity",
    "load_memory",
    "recall_curve",
]
