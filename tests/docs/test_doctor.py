"""Every line of `featcl doctor` is true: with a hub that answers, refuses, is silent, or is not asked."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import featcl
from featcl.errors import FeatclError
from featcl.studies import doctor, hub_access
from featcl.studies.hub_access import HubEntry, advice, look
from tests.conftest import tiny_model, tiny_tokenizer
from tests.runs import make_sae

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1; no socket may open."""
    from huggingface_hub import constants

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does for repositories that are open, gated, hidden, or without the file."""

    def do_HEAD(self) -> None:
        name = self.path.split("/resolve/")[0].strip("/")
        code, error = {
            "owner/open": (200, None),
            "owner/gated": (401, "GatedRepo"),
            "owner/refused": (403, "GatedRepo"),
            "owner/bare": (404, "EntryNotFound"),
        }.get(name, (401, "RepoNotFound"))
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"etag"')
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on this machine, which is asked instead of the real one."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_to(url, monkeypatch)
    yield url
    server.shutdown()
    server.server_close()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def snapshot(cache: Path, name: str) -> Path:
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def save_model(folder: Path) -> None:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_and_its_answers_told_apart(hub: str, cache: Path) -> None:
    names = ("open", "gated", "refused", "bare", "hidden")
    found = look({f"owner/{name}": "model" for name in names})
    assert {name.removeprefix("owner/"): entry.state for name, entry in found.items()} == {
        "open": "reachable", "gated": "gated", "refused": "gated", "bare": "absent", "hidden": "absent",
    }  # fmt: skip
    assert not cache.exists(), "nothing is downloaded"
    lines = advice(found)
    assert any("accept the licence of owner/gated, owner/refused" in line and "hf auth login" in line for line in lines)
    assert not any("owner/open" in line for line in lines)


def test_no_answer_is_no_wait_without_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)  # nobody listens
        assert look({"owner/open": "model"})["owner/open"].state == "unreachable"
        closed.listen()  # somebody listens, and says nothing
        found = look({"owner/open": "model", "owner/gated": "model"}, timeout=0.3)
    assert {entry.state for entry in found.values()} == {"unreachable"}
    assert advice(found) == [
        "no way to owner/open, owner/gated from here: download on another machine (hf download) and give the folder"
    ]


def test_offline_nothing_is_asked(offline: None, cache: Path) -> None:
    found = look()
    assert set(found) == set(hub_access.GUIDES)
    assert {entry.state for entry in found.values()} == {"offline"}
    assert "HF_HUB_OFFLINE" in advice(found)[0]


def test_cached_is_what_load_model_takes(offline: None, cache: Path) -> None:
    """The doctor and the loader agree on every state of the cache."""
    name = "owner/open"
    folder = snapshot(cache, name)
    assert look({name: "model"})[name].state == "incomplete"
    with pytest.raises(FeatclError):
        featcl.load_model(name)
    save_model(folder)
    assert look({name: "model"})[name] == HubEntry("cached", f"in the cache, commit {COMMIT[:7]}")
    model, _ = featcl.load_model(name)
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    for lost in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / lost).rename(folder / "away")
        entry = look({name: "model"})[name]
        assert (entry.state, lost in entry.about) == ("incomplete", True)
        with pytest.raises(FeatclError):
            featcl.load_model(name)
        (folder / "away").rename(folder / lost)
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-1.safetensors" in look({name: "model"})[name].about
    assert advice(look({name: "model"})) == [f"finish the download with network: hf download {name}"]


def test_what_the_hub_library_knows_to_be_cut_off_is_incomplete(
    offline: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that was cut off left a list of files of which some are not there."""

    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError("the cached snapshot is incomplete")

    save_model(snapshot(cache, "owner/open"))
    assert look({"owner/open": "model"})["owner/open"].state == "cached"
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert look({"owner/open": "model"})["owner/open"].state == "incomplete"
    with pytest.raises(FeatclError, match="incomplete"):
        featcl.load_model("owner/open")


def test_saes_in_the_cache_are_counted(offline: None, cache: Path) -> None:
    name = "google/gemma-scope-2b-pt-res"
    folder = snapshot(cache, name)
    assert look({name: "saes"})[name].state == "offline"
    make_sae(folder / "layer_1", layer=1)
    make_sae(folder / "layer_2", layer=2)
    assert look({name: "saes"})[name] == HubEntry("cached", f"2 weight files in the cache, commit {COMMIT[:7]}")


def test_the_guides_name_what_the_pages_name(root: Path) -> None:
    text = "\n".join(path.read_text() for path in (root / "README.md", *(root / "docs").rglob("*.md")))
    named = [name for name in hub_access.GUIDES if name in text]
    assert {"google/gemma-2-2b-it", "allenai/OLMo-2-0425-1B-Instruct"} <= set(named)


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`without("wandb")`: as if the package were not installed."""

    def hide(package: str) -> None:
        module = {"sae-lens": "sae_lens", "transformer-lens": "transformer_lens", "lm-eval": "lm_eval"}
        monkeypatch.setitem(sys.modules, module.get(package, package), None)
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name == package:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return hide


def test_missing_packages_are_said_with_what_installs_them(
    offline: None, cache: Path, without: Callable[[str], None], tmp_path: Path
) -> None:
    for package in ("sae-lens", "wandb", "bm25s", "trl"):
        without(package)
    found = doctor.examine(tmp_path)
    assert {"sae-lens", "wandb", "bm25s", "trl"} <= set(found.missing)
    lines = str(found).splitlines()
    for package, told in (
        ("wandb", "missing; for W&B; a run goes on without it (pip install wandb)"),
        ("bm25s", "(pip install 'featcl[retrieval]')"),
        ("trl", "(pip install 'featcl[trl]')"),
    ):
        [line] = [line for line in lines if line.startswith(f"{package} ")]
        assert told in line
    assert [line for line in found.problems if "sae-lens" in line], "without SAEs no run starts"
    assert not [line for line in found.problems if "wandb" in line]


def test_what_is_needed_is_needed(without: Callable[[str], None]) -> None:
    without("sae-lens")
    with pytest.raises(FeatclError, match="pip install sae-lens"):
        featcl.load_sae("lab/olmo2/resid_post_3")


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    from featcl.tracking import plots_style

    loaded = {name for name in sys.modules if name.split(".")[0] == "matplotlib"}
    for name in loaded | {"matplotlib", "matplotlib.figure"}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        plots_style.panels()


def test_a_run_goes_on_without_trackers(
    without: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from featcl.tracking import RunNames, open_backends

    for package in ("wandb", "tensorboard", "trackio"):
        without(package)
    run = RunNames(project="p", study="s", arm="a", seed=0, config={})
    with caplog.at_level(logging.WARNING):
        assert open_backends(tmp_path, run, backends=("tensorboard", "trackio")) == []
    for package in ("wandb", "tensorboard", "trackio"):
        assert f"{package} is not installed" in caplog.text


def test_other_extras_say_what_they_are_for(without: Callable[[str], None]) -> None:
    from featcl.methods.bm25 import Bm25

    without("bm25s")
    with pytest.raises(FeatclError, match=r"featcl\[retrieval\]"):
        Bm25(["a text"])


def test_versions_out_of_range_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["torch>=2.6", "einops>=0.8", "trl>=9; extra == 'trl'"]
    )
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.5.1", "einops": "0.8.2", "trl": "0.1"}.__getitem__)
    lines = list(doctor.outdated())
    assert lines == [
        "torch is 2.5.1, and featcl needs >=2.6: pip install 'torch>=2.6'",
        "trl is 0.1, and featcl needs >=9: pip install 'trl>=9; extra == \"trl\"'",
    ]
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.13.0+cpu", "einops": "0.8.2", "trl": "9.1"}.get)
    assert list(doctor.outdated()) == []


# --- the machine ------------------------------------------------------------------------------------------------------


def test_threads_devices_and_folders(
    offline: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "LAB_ASSETS", tmp_path / "nowhere")
    (tmp_path / "taken").write_text("a file")
    found = doctor.examine(tmp_path / "taken")
    for told in ("torch uses 10000 threads", "an NVIDIA driver is here", "featcl lab train --model lab/olmo2",
                 f"{tmp_path / 'taken'} cannot be written to"):  # fmt: skip
        assert [line for line in found.problems if told in line], told
    assert json.loads(json.dumps(found.to_json()))["hub"]["google/gemma-2-2b-it"]["state"] == "offline"


def test_a_sound_machine_has_no_problems(
    offline: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    found = doctor.examine(tmp_path)
    assert found.problems == ()
    assert str(found).endswith("no problems found")
