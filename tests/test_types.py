"""Shapes and types on tensor signatures hold: jaxtyping and beartype check them while other tests run.

In a process of its own: the check is an import hook, free at run time, and it answers a wrong shape before our own
error can, so tests of those errors are left out there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "featcl.subspace", "featcl.models", "featcl.objectives.divergence", "featcl.features.directions",
    "featcl.features.controls", "featcl.features.encoder", "featcl.features.activations",
    "featcl.features.logits", "featcl.features.shuffled", "featcl.adapters", "featcl.memory",
)  # fmt: skip
TESTS = ("test_subspace.py", "test_models.py", "objectives/test_divergence.py", "features/test_directions.py",
         "features/test_controls.py", "features/test_encoder.py", "features/test_activations.py",
         "features/test_show.py", "adapters/test_theorems.py", "adapters/test_trunk.py",
         "adapters/test_adapter.py", "memory/test_reference.py", "memory/test_state.py")  # fmt: skip


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    hook = f"--jaxtyping-packages={','.join(PACKAGES)},beartype.beartype"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", hook, *arguments]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=root)


def test_annotated_shapes_are_the_real_ones() -> None:
    done = check("-k", "not bad", *(f"tests/{name}" for name in TESTS))
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_wrong_shape_is_seen(tmp_path: Path) -> None:
    """Negative control: the same hook fails on a call with a wrong shape."""
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("import torch, featcl.subspace\ndef test_it(): featcl.subspace.lowdin(torch.ones(2, 3, 4))\n")
    done = check(str(wrong))
    assert done.returncode == 1
    assert "TypeCheckError" in done.stdout
