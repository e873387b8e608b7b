"""`import featcl` is light and needs no optional library."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import featcl


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_costs_little_beyond_torch_and_transformers() -> None:
    code = (
        "import torch, transformers, time, sys; start = time.perf_counter(); import featcl; "
        "print(time.perf_counter() - start, 'peft' in sys.modules)"
    )
    seconds, peft = run_python(code).split()
    assert float(seconds) < 2.0
    assert peft == "False"


def test_public_names_without_the_optional_libraries() -> None:
    blocked = "{'sae_lens', 'transformer_lens', 'wandb', 'submitit', 'typer', 'matplotlib'}"
    code = (
        "import sys, torch, transformers, importlib.abc, time\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError('No module named ' + repr(name))\n"
        "sys.meta_path.insert(0, Missing())\n"
        "start = time.perf_counter()\n"
        "import featcl\n"
        "for name in featcl.__all__: getattr(featcl, name)\n"
        "print(time.perf_counter() - start, 'peft' in sys.modules)\n"
    )
    seconds, peft = run_python(code).split()
    assert peft == "False"
    assert float(seconds) < 2.0


def test_every_public_name_exists_and_is_listed() -> None:
    assert set(featcl.__all__) == {"__version__", *featcl._NAMES, *featcl._MODULES}
    for name in featcl.__all__:
        assert getattr(featcl, name) is not None, name
        assert name in dir(featcl)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = featcl.nothing  # type: ignore[attr-defined]


def test_run_is_a_module_that_can_be_called() -> None:
    assert importlib.util.find_spec("featcl.run") is not None
    assert callable(featcl.run)


def test_the_names_that_others_call() -> None:
    assert featcl.objectives.kl_divergence.__doc__
    assert featcl.evaluation.stream_metrics.__doc__
    assert featcl.RunConfig.load.__doc__


def test_version_is_the_one_of_the_package(root) -> None:
    assert f'version = "{featcl.__version__}"' in (root / "pyproject.toml").read_text()
