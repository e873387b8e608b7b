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

from featcl.cli_ledger import add_commands
from featcl.cli_report import add_report_commands
from featcl.cli_study import add_study_commands
from featcl.config import ConfigError
from featcl.errors import FeatclError
from featcl.files import require_file, require_folder

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
Sae = Annotated[str, typer.Option("--sae", help="lab/<model>/resid_post_<L>, a folder or file, or <release>/<sae_id>.")]
Texts = Annotated[list[Path] | None, typer.Option("--text", help="A .txt or .jsonl file, also .gz; may be repeated.")]
HookName = Annotated[str | None, typer.Option("--hook-name", help="Where the SAE lives, if its files do not say.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not test on loading whether the SAE fits the model.")]
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
    except OSError as error:
        if debug or error.filename is None:  # only one that names a path is about the user's files
            raise
        return _complain(f"{error.filename}: {error.strerror}")
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
    dry: Annotated[bool, typer.Option("--dry-run", help="Only resolve it all, and estimate memory and time.")] = False,
    teraflops: Annotated[
        float | None, typer.Option(min=1e-6, help="Of --dry-run: what the device sustains; 100 on CUDA, else 0.05.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one arm with one seed: learn from the stream, measure what is learned and forgotten."""
    from featcl.config import RunConfig

    if dry:
        _dry_run(RunConfig.load(config, overrides or ()), teraflops, as_json=as_json)
        return
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


def _dry_run(config: Any, teraflops: float | None, *, as_json: bool) -> None:
    """Exit 2 where something is missing, after all of it has been named."""
    from featcl.studies.dry_run import dry_run

    found = dry_run(config, teraflops=teraflops)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found)
    if found.missing:
        raise FeatclError(f"{len(found.missing)} of what {config.folder} needs is missing: {'; '.join(found.missing)}")


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
def chat(
    config: Annotated[Path, typer.Argument(help="A YAML file, for example experiments/quickstart/base.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="learner.lr=1e-3 …")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first in every dialogue.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of replies; 0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply in tokens.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget the chat that lies there.")] = False,
    as_json: Json = False,
) -> None:
    """Talk with a learner: what you judge (/good, /bad, /correct TEXT) it learns at once; /help lists all commands.

    The chat is kept in RESULTS/STUDY/ARM/chat-SEED, and goes on there the next time. Lines may also come from a pipe.
    """
    from featcl.config import RunConfig
    from featcl.studies.terminal import talk

    settings = {"system": system, "temperature": temperature, "max_new_tokens": max_new_tokens}
    try:
        talk(RunConfig.load(config, overrides or ()), overwrite=overwrite, as_json=as_json, **settings)
    except KeyboardInterrupt:
        print("featcl: interrupted; what was said and learned is kept", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def doctor(
    output: Annotated[Path, typer.Option(help="Where results would go.")] = Path("results"), as_json: Json = False
) -> None:
    """Say which versions, devices and threads a run would use, what is missing, and what would go wrong."""
    from featcl.studies.doctor import examine

    found = examine(output)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found)


add_commands(app)  # log, diff, blame, revert, rollback
add_report_commands(app)  # report, table
add_study_commands(app)  # sweep, reproduce


# --- features ----------------------------------------------------------------------------------------------------


@features.command()
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; several layers get a folder each in it.")],
    layer: Annotated[list[int] | None, typer.Option(help="Block that gets an SAE; may be repeated.")] = None,
    text: Texts = None,
    more: More = None,
    architecture: Annotated[str, typer.Option(help="batchtopk, topk, jumprelu or matryoshka_batchtopk.")] = "batchtopk",
    site: Annotated[str, typer.Option(help="resid_post (the block's output), mlp_out or attn_z.")] = "resid_post",
    d_sae: Annotated[int | None, typer.Option(help="Number of features; 8 times the width by default.")] = None,
    l0: Annotated[
        float | None, typer.Option(help="Active features per token; a fifth of the width by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many activations are trained on.")] = 1_000_000,
    batch_size: Annotated[int, typer.Option(help="Activations per step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Adam's.")] = 3e-3,
    context: Annotated[int | None, typer.Option(help="Longest window of tokens; the model's by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and shuffling.")] = 0,
    like: Annotated[Path | None, typer.Option(help="An SAE's featcl.json: train it again, bit by bit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an SAE that lies there.")] = False,
    as_json: Json = False,
) -> None:
    """Train SAEs (SAELens) on a model and texts or trajectories; no hub. The same command goes on after a stop."""
    from featcl.features import train_from_files

    try:
        trained = train_from_files(
            model, _files(text, more), layer or (), out, overwrite=overwrite, architecture=architecture, site=site,
            d_sae=d_sae, l0=l0, tokens=tokens, batch_size=batch_size, lr=lr, context=context, seed=seed, like=like,
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        print(f"featcl: interrupted; {stopped or 'nothing was trained yet'}", file=sys.stderr)
        raise typer.Exit(130) from None
    found = {str(key): {"folder": str(sae.folder), **sae.health.record()} for key, sae in trained.items()}
    if as_json:
        _print_json(found)
        return
    for sae in trained.values():
        print(f"{sae.folder}: {_health(sae.health.record())}")


@features.command()
def check(
    sae: Sae, model: Model, text: Texts = None, more: More = None, hook_name: HookName = None, as_json: Json = False
) -> None:
    """Measure how well an SAE stands for what it was trained on, on text; one that does not fit is an error."""
    from featcl.features import check_sae

    files = _files(text, more)
    loaded_sae, loaded_model, tokenizer = _sae_and_model(sae, model, hook_name, check=False)  # measured on the texts
    health = check_sae(loaded_sae, loaded_model, tokenizer, _documents(files, tokenizer)).record()
    if as_json:
        _print_json(health)
    else:
        print(_health(health))


@features.command()
def select(
    sae: Sae,
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the directions.")],
    selector: Annotated[
        str | None, typer.Option(help="ids, contrast, persona, rarity, attribution, … or {union: [contrast, rarity]}.")
    ] = None,
    bundle: Annotated[str | None, typer.Option(help="home-assistant, coding-agent/design, or a .yaml file.")] = None,
    k: Annotated[int | None, typer.Option(help="How many features.")] = None,
    positive: Annotated[list[Path] | None, typer.Option(help="Text with what is wanted.")] = None,
    negative: Annotated[list[Path] | None, typer.Option(help="Text without it.")] = None,
    stream: Annotated[list[Path] | None, typer.Option(help="Text of a calibration split.")] = None,
    background: Annotated[list[Path] | None, typer.Option(help="Ordinary text.")] = None,
    held_out: Annotated[list[Path] | None, typer.Option(help="Text of the evaluation; an overlap is refused.")] = None,
    ids: Annotated[str | None, typer.Option(help="Feature ids, for example 3,17,240.")] = None,
    query: Annotated[str | None, typer.Option(help="For explanations: formal greeting | politeness.")] = None,
    explanations: Annotated[Path | None, typer.Option(help="Exported explanations; the local cache otherwise.")] = None,
    reviewed: Annotated[Path | None, typer.Option(help="For hand: a YAML list of features with reasons.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Steer with each, on every second block of the texts, and on no others.")
    ] = False,
    hook_name: HookName = None,
    no_check: NoCheck = False,
    seed: Annotated[int, typer.Option(help="Of selectors that draw random numbers.")] = 0,
    as_json: Json = False,
) -> None:
    """Choose features of an SAE and save them as directions."""
    if (selector is None) == (bundle is None):
        raise FeatclError("give either --selector or --bundle")
    require_folder(out)
    from featcl.features import select_features
    from featcl.features.bundle import Bundle

    chosen_by, listed = _selector(selector), _ids(ids)
    if bundle is not None and not bundle.endswith((".yaml", ".yml")) and _is_path(bundle):
        raise FeatclError(f"--bundle {bundle}: a bundle's file ends in .yaml; anything else names a shipped bundle")
    named = Bundle.load(bundle) if bundle is not None else None
    paths = {"positive": positive, "negative": negative, "stream": stream, "background": background}
    loaded_sae, loaded_model, tokenizer = _sae_and_model(sae, model, hook_name, check=not no_check)
    texts = {name: _documents(files, tokenizer) for name, files in paths.items() if files}
    target: dict[str, Any] = {}
    if validate:
        texts, target = _kept_for_validation(texts)
    common: dict[str, Any] = {"explanations": explanations, "seed": seed}
    if held_out:
        common["held_out"] = _documents(held_out, tokenizer)
    if named is not None:
        directions = named.merged(loaded_sae, loaded_model, tokenizer, **common)
    else:
        directions = select_features(
            loaded_sae, loaded_model, tokenizer, selector=chosen_by, k=k, feature_ids=listed, query=query,
            reviewed=reviewed, **texts, **common,
        )  # fmt: skip
    finding = None
    if validate:
        from featcl.features.validation import validate as validated

        finding = validated(directions, loaded_model, tokenizer, **target)
        directions = finding.mark(directions)
    directions.save(out)
    if as_json:
        record = {"folder": str(out), "feature_ids": directions.feature_ids, "digest": directions.digest}
        _print_json(record | ({"validation": finding.to_json()} if finding else {}))
        return
    _print_directions(directions)
    if finding:
        print(finding)
    print(f"saved in {out}")


@features.command()
def show(
    folder: Annotated[Path | None, typer.Argument(help="Directions saved by `featcl features select`.")] = None,
    sae: Annotated[str | None, typer.Option(help="An SAE instead.")] = None,
    model: Annotated[str | None, typer.Option(help="With texts: the model they are read with.")] = None,
    text: Texts = None,
    ids: Annotated[str | None, typer.Option(help="Feature ids; of an SAE the most active ones by default.")] = None,
    k: Annotated[int, typer.Option(help="How many of the most active.")] = 12,
    out: Annotated[str | None, typer.Option(help="One HTML file to write.")] = None,
    hook_name: HookName = None,
    no_check: NoCheck = False,
    as_json: Json = False,
) -> None:
    """Look at features: where they fire in your texts, how strongly, and what they do to the next token.

    Without texts, directions are listed with their ids, scores, and where they come from.
    """
    from featcl.features import Directions

    if (folder is None) == (sae is None):
        raise FeatclError("give either a folder of directions or --sae")
    if k < 1:
        raise FeatclError(f"--k {k}: k must be at least 1")
    if out is not None:
        require_file(out)  # a string until here: a Path forgets its trailing slash
    directions = None if folder is None else Directions.load(folder)
    if directions is not None and model is None and not text and out is None:
        shown = ("feature_ids", "hook_name", "selector", "digest", "manifest")
        if as_json:
            _print_json({name: getattr(directions, name) for name in shown})
        else:
            _print_directions(directions)
        return
    from featcl.features.show import most_active
    from featcl.features.show import show as dashboards

    if model is None:
        raise FeatclError("looking at where features fire needs --model and --text")
    files, wanted = _files(text, None), _ids(ids)
    source: Any
    if sae is None:
        from featcl.models import load_model

        source, (loaded_model, tokenizer) = directions, load_model(model)
    else:
        source, loaded_model, tokenizer = _sae_and_model(sae, model, hook_name, check=not no_check)
    documents = _documents(files, tokenizer)
    if sae is not None and wanted is None:
        wanted = most_active(source, loaded_model, tokenizer, documents, k=k)
    found = dashboards(source, loaded_model, tokenizer, documents, wanted)
    if out is not None:
        found.save(out)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found)
        if out is not None:
            print(f"saved as {out}")


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
    """Make a lab model's assets anew: tokenizer, base, teacher and SAEs. Takes 35 to 55 minutes on two cores."""
    from featcl.lab.make import make_assets
    from featcl.learning.heap import keep_heap_
    from featcl.models import LAB_ASSETS

    keep_heap_()
    family = model.removeprefix("lab/")
    make_assets(
        family, out or LAB_ASSETS / family, seed=seed, say=lambda line: print(line, file=sys.stderr, flush=True)
    )


def _files(text: list[Path] | None, more: list[Path] | None) -> list[Path]:
    files = [*(text or ()), *(more or ())]
    if not files:
        raise FeatclError("give at least one text file: --text FILE")
    return files


def _sae_and_model(sae: str, model: str, hook_name: str | None, *, check: bool) -> tuple[Any, Any, Any]:
    """SAE, model and tokenizer; where the SAE is read is printed on standard error, and whether it fits is tested."""
    from featcl.features import load_sae
    from featcl.models import load_model

    loaded, tokenizer = load_model(model)
    options = {"device": loaded.device, "model": loaded, "tokenizer": tokenizer, "hook_name": hook_name}
    return load_sae(sae, **options, check=check), loaded, tokenizer


def _documents(paths: list[Path], tokenizer: Any) -> list[Any]:
    from featcl.features.tokens import read_documents

    return [document for path in paths for document in read_documents(path, tokenizer)]


def _kept_for_validation(texts: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Every second block of the target texts, and of those without it, is kept from the selection."""
    from featcl.features.provenance import text_blocks

    target = "positive" if "positive" in texts else "stream"
    if target not in texts:
        raise FeatclError("--validate needs texts to steer on: --positive, or --stream")
    kept: dict[str, Any] = {}
    for name, role in ((target, "positive"), ("negative", "negative")):
        if name in texts:
            blocks = [b for text in texts[name] for b in (text_blocks(text) if isinstance(text, str) else [text])]
            texts, kept[role] = {**texts, name: blocks[0::2]}, blocks[1::2]
    return texts, kept


def _selector(text: str | None) -> Any:
    """A name, or a combination written as YAML."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise FeatclError(f"--selector {text!r}: a combination reads {{union: [contrast, rarity]}}") from None


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or Path(name).suffix != ""


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
