"""`featcl export`: what a run learned, as something that needs no featcl."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.adapters.export import CONFIG, WEIGHTS, add_update_, load_peft, save_model
from featcl.adapters.hook_folder import refuse_peft
from featcl.adapters.hook_plan import HOOK_KINDS
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.models import load_model

FORMS = ("peft", "merged")
NO_LORA = {
    "full": "its adapter/ is a plain model folder already, which from_pretrained loads",
    "osf": "its adapter/ is a folder of PEFT's OSF, which PeftModel.from_pretrained loads",
    "mixture": "its update depends on the token; its adapter/ is read by featcl.adapters.mixture.load_mixture",
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where it lies.
        form: `peft` or `merged`.
        base: The model that it was learned on.
        rank: Of the LoRA.
        modules: How many linears it changes.
    """

    folder: Path
    form: str
    base: str
    rank: int
    modules: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"folder": str(self.folder), "form": self.form, "base": self.base, "rank": self.rank,
                "modules": self.modules}  # fmt: skip


def export_run(run_dir: str | Path, *, form: str, out: str | Path | None = None, overwrite: bool = False) -> Exported:
    """Write the adapter of a run as a plain PEFT folder, or merged into its model.

    Args:
        run_dir: Folder of a run, `results/<study>/<arm>/seed-<n>`.
        form: `peft`, or `merged` for a Hugging Face folder with tokenizer.
        out: Folder to write; by default the run's own `adapter` (which is a PEFT folder already) or `merged`.
        overwrite: Replace what lies in `out`.

    Raises:
        FeatclError: If that is not a run with an adapter, its kind has no such form, or `out` is not empty.
    """
    run_dir = Path(run_dir)
    if form not in FORMS:
        raise FeatclError(f"export: unknown form {form!r}, there is {' and '.join(FORMS)}")
    config = _config(run_dir)
    if config.adapter.kind in HOOK_KINDS:
        raise FeatclError(f"{run_dir}: {refuse_peft(config.adapter.kind)}")
    if (why := NO_LORA.get(config.adapter.kind)) is not None:
        raise FeatclError(f"{run_dir}: kind {config.adapter.kind!r} is no LoRA, so there is none to export: {why}")
    adapter = run_dir / "adapter"
    if not adapter.is_dir():
        raise FeatclError(f"{run_dir} has no adapter/: the run has not finished")
    lora = load_peft(adapter)
    target = Path(out) if out is not None else adapter if form == "peft" else run_dir / "merged"
    if target.resolve() != adapter.resolve():
        _make_room(target, overwrite=overwrite)
        if form == "peft":
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(adapter / name, target / name)
    elif form == "merged":
        raise FeatclError(f"{target} holds the adapter: give another --out")
    if form == "merged":
        model, tokenizer = load_model(config.model, dtype=config.runtime.dtype, device="cpu")
        add_update_(model, lora.factors)
        save_model(model, tokenizer, target)
    return Exported(target, form, config.model, lora.rank, len(lora.factors))


def _config(run_dir: Path) -> RunConfig:
    try:
        found = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise FeatclError(f"{run_dir} is not a run's folder: {error}") from error
    except ValueError as error:
        raise FeatclError(f"{run_dir / 'config.json'} is not JSON: {error}") from error
    return RunConfig.from_dict({key: value for key, value in found.items() if key != "digest"})


def _make_room(target: Path, *, overwrite: bool) -> None:
    """An empty folder; with `overwrite`, weights that lie there go, and nothing else."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite or not target.is_dir():
            raise FeatclError(f"{target} exists and is not empty: use --overwrite, or another --out")
        for old in target.glob("*.safetensors*"):
            old.unlink()
    target.mkdir(parents=True, exist_ok=True)
