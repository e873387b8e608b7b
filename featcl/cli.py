"""The `featcl` command: reads arguments, calls one room per command, prints what it returns.

Exit codes: 0 done, 2 bad input (one line on standard error; `--debug` anywhere shows the traceback), 130 Ctrl-C.
Rooms are imported inside the commands, so that `featcl --help` is quick.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from featcl.config import ConfigError
from featcl.errors import FeatclError

app = typer.Typer(
    name="featcl",
    help="Feature-constrained test-time learning. Add --debug to any command for the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
features = typer.Typer(
    help="Train, check, select and look at SAE features.", no_args_is_help=True, rich_markup_mode=None
)
lab = typer.Typer(help="The pocket laboratory.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(features, name="features")
app.add_typer(lab, name="lab")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[str, typer.Option("--model", help="lab/olmo2, lab/gemma2, a folder, or a Hugging Face id.")]
LabModel = Annotated[str, typer.Option("--model", help="lab/olmo2 or lab/gemma2.")]
Sae = Annotated[str, typer.Option("--sae", help="lab/<model>/resid_post_<L>, or a folder.")]
Texts = Annotated[list[Path] | None, typer.Option("--text", help="A .txt or .txt.gz file; may be repeated.")]
More = Annotated[list[Path] | None, typer.Argument(hidden=True)]  # what a shell pattern after --text expands to


def main() -> None:
    """Entry point: runs the command and turns what can go wrong into an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about other libraries
    sys.exit(invoke(arguments, debug=len(arguments) < len(sys.argv) - 1))


def invoke(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code; errors that are not the user's pass through."""
    try:
        return app(arguments, standalone_mode=False, prog_name="featcl") or 0
    except (FeatclError, ConfigError) as error:
        if debug:
            raise
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # anything but a usage error of the command line itself
            raise
        return _complain(f"{error.format_message()} (featcl --help)")  # pyright: ignore[reportAttributeAccessIssue]


def _complain(message: str) -> int:
    print(f"featcl: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file, for example experiments/quickstart/base.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="adapter.kind=none …")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of another config.")] = False,
    as_json: Json = False,
) -> None:
    """Run one arm with one seed: learn from the stream, measure what is learned and forgotten."""
    from featcl.config import RunConfig
    from featcl.run import run as run_config

    try:
        result = run_config(RunConfig.load(config, overrides or ()), overwrite=overwrite)
    except KeyboardInterrupt as stopped:
        print(f"featcl: interrupted; {stopped or 'nothing was running yet'}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(result.summary)
    else:
        result.print()


@app.command()
def table(
    study: Annotated[Path, typer.Argument(help="A folder of configs, or the folder of a study's results.")],
    output: Annotated[Path, typer.Option(help="Where the results lie.")] = Path("results"),
    as_json: Json = False,
) -> None:
    """Put the finished arms of a study side by side."""
    from featcl.studies.table import study_table

    result = study_table(study, output=output)
    if as_json:
        _print_json(result.rows)
    else:
        result.print()


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run: results/<study>/<arm>/seed-<n>.")],
    to: Annotated[str, typer.Option(help="peft: a plain LoRA folder. merged: a Hugging Face folder with tokenizer.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN_DIR/adapter or RUN_DIR/merged.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies there.")] = False,
    as_json: Json = False,
) -> None:
    """Write what a run learned as something that needs no featcl.

    For GGUF, export to peft, then run llama.cpp's convert_lora_to_gguf.py --base MODEL_FOLDER OUT.
    """
    from featcl.studies.export import export_run

    done = export_run(run_dir, form=to, out=out, overwrite=overwrite)
    if as_json:
        _print_json(done.to_json())
    else:
        print(f"{done.folder}: {done.form}, {done.modules} modules of {done.base}, rank {done.rank}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say which versions, device and threads a run would use, and what is missing."""
    from featcl.tracking.environment import environment

    found = environment()
    if as_json:
        _print_json(found)
        return
    for key, value in found.items():
        for name, version in value.items() if isinstance(value, dict) else {key: value}.items():
            print(f"{name:24} {'missing (optional)' if version is None else version}")


# --- features ----------------------------------------------------------------------------------------------------


@features.command()
def train(
    model: Model,
    layer: Annotated[list[int], typer.Option(help="Block whose output gets an SAE; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder to write; several layers get a folder each in it.")],
    text: Texts = None,
    more: More = None,
    architecture: Annotated[str, typer.Option(help="batchtopk, topk, jumprelu or matryoshka_batchtopk.")] = "batchtopk",
    d_sae: Annotated[int | None, typer.Option(help="Number of features; 8 d_model by default.")] = None,
    l0: Annotated[float | None, typer.Option(help="Active features per token; d_model / 5 by default.")] = None,
    tokens: Annotated[int, typer.Option(help="How many activations are trained on.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of initial weights and shuffling.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an SAE that lies there.")] = False,
    as_json: Json = False,
) -> None:
    """Train SAEs (SAELens) on a model and text files; no hub."""
    from featcl.features import train_from_files

    trained = train_from_files(
        model, _files(text, more), layer, out, overwrite=overwrite, architecture=architecture, d_sae=d_sae, l0=l0,
        tokens=tokens, seed=seed,
    )  # fmt: skip
    found = {str(key): {"folder": str(sae.folder), **sae.health.record()} for key, sae in trained.items()}
    if as_json:
        _print_json(found)
        return
    for sae in trained.values():
        print(f"{sae.folder}: {_health(sae.health.record())}")


@features.command()
def check(sae: Sae, model: Model, text: Texts = None, more: More = None, as_json: Json = False) -> None:
    """Measure how well an SAE stands for a model's residual stream on text."""
    from featcl.features import check_sae, load_sae, read_texts
    from featcl.models import load_model

    texts = [document for path in _files(text, more) for document in read_texts(path)]
    loaded_model, tokenizer = load_model(model)
    health = check_sae(load_sae(sae, device=loaded_model.device), loaded_model, tokenizer, texts).record()
    if as_json:
        _print_json(health)
    else:
        print(_health(health))


@features.command()
def select(
    sae: Sae,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the directions.")],
    selector: Annotated[str, typer.Option(help="ids, contrast, rarity or gradient_energy.")],
    k: Annotated[int | None, typer.Option(help="How many features.")] = None,
    positive: Annotated[list[Path] | None, typer.Option(help="Text with what is wanted.")] = None,
    negative: Annotated[list[Path] | None, typer.Option(help="Text without it.")] = None,
    stream: Annotated[list[Path] | None, typer.Option(help="Text of a calibration split.")] = None,
    background: Annotated[list[Path] | None, typer.Option(help="Ordinary text.")] = None,
    ids: Annotated[str | None, typer.Option(help="Feature ids, for example 3,17,240.")] = None,
    as_json: Json = False,
) -> None:
    """Choose features of an SAE and save them as directions."""
    from featcl.features import load_sae, read_texts, select_features
    from featcl.models import load_model

    def texts(paths: list[Path] | None) -> list[str] | None:
        return [document for path in paths for document in read_texts(path)] if paths else None

    loaded_model, tokenizer = load_model(model)
    directions = select_features(
        load_sae(sae, device=loaded_model.device), loaded_model, tokenizer, selector=selector, k=k,
        positive=texts(positive), negative=texts(negative), stream=texts(stream), background=texts(background),
        feature_ids=_ids(ids),
    )  # fmt: skip
    directions.save(out)
    if as_json:
        _print_json({"folder": str(out), "feature_ids": directions.feature_ids, "digest": directions.digest})
    else:
        _print_directions(directions)
        print(f"saved in {out}")


@features.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Directions saved by `featcl features select` or by a run.")],
    as_json: Json = False,
) -> None:
    """Print saved directions: ids, scores, and where they come from."""
    from featcl.features import Directions

    directions = Directions.load(folder)
    if as_json:
        shown = ("feature_ids", "hook_name", "selector", "digest", "manifest")
        _print_json({name: getattr(directions, name) for name in shown})
    else:
        _print_directions(directions)


# --- lab ---------------------------------------------------------------------------------------------------------


@lab.command("check")
def lab_check(model: LabModel = "lab/olmo2", as_json: Json = False) -> None:
    """Measure whether the laboratory discriminates: every claim of its design, with its bound; exit 1 if one fails."""
    from featcl.studies.lab_check import check_lab

    report = check_lab(model, say=lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        _print_json(report.to_json())
    else:
        report.print()
    if not report.holds:
        raise typer.Exit(1)


@lab.command("train")
def lab_train(
    model: LabModel = "lab/olmo2",
    out: Annotated[Path | None, typer.Option(help="Folder to write; the package's own assets by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and order.")] = 0,
) -> None:
    """Make a lab model's assets anew: tokenizer, base, teacher and SAEs. Takes about 25 minutes on two cores."""
    from featcl.lab.make import make_assets
    from featcl.models import LAB_ASSETS

    family = model.removeprefix("lab/")
    make_assets(
        family, out or LAB_ASSETS / family, seed=seed, say=lambda line: print(line, file=sys.stderr, flush=True)
    )


def _files(text: list[Path] | None, more: list[Path] | None) -> list[Path]:
    files = [*(text or ()), *(more or ())]
    if not files:
        raise FeatclError("give at least one text file: --text FILE")
    return files


def _ids(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise FeatclError(f"--ids {text!r}: give whole numbers such as 3,17,240") from None


def _health(health: dict[str, Any]) -> str:
    names = ("fvu", "l0", "dead_fraction", "loss_recovered")
    return ", ".join(f"{name} {health[name]:.3g}" for name in names) + f" on {health['tokens']} tokens"


def _print_directions(directions: Any) -> None:
    print(directions)
    scores = directions.manifest.get("scores", {})
    print("  ".join(f"{heading:>14}" for heading in ("feature", *scores)))
    for row, label in enumerate(directions.labels):
        print("  ".join([f"{label:>14}", *(f"{values[row]:>14.4g}" for values in scores.values())]))


if __name__ == "__main__":
    main()
