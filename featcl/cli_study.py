"""Commands that run studies: sweep, finalists, reproduce."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from featcl.errors import FeatclError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Study = Annotated[Path, typer.Argument(help="The study's folder of configs, such as experiments/quickstart.")]


def add_study_commands(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (sweep, finalists, reproduce):
        app.command()(command)


def sweep(
    study: Study,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For all arms: model=lab/gemma2 …")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2; else those of the configs and their grids.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these, a,b: names of arms, or of files with grids.")] = None,
    launcher: Annotated[str, typer.Option(help="local: processes here. slurm: a job array.")] = "local",
    jobs: Annotated[
        int | None, typer.Option(help="Workers; one for each GPU or one, and 8 with slurm, by default.")
    ] = None,
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For sbatch: partition=gpu, gpus_per_node=1 …")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Where results go, in place of the configs' output.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of other configs.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only resolve it all, and estimate memory and time.")] = False,
    as_json: Json = False,
) -> None:
    """Run every arm of a study with every seed, and make its table; what is finished is not run again.

    The same command goes on after Ctrl-C or a crash. An arm that fails does not stop the others.
    """
    from featcl.studies.launch import read_options
    from featcl.studies.sweep import sweep as sweep_study

    if dry:
        _dry_sweep(study, overrides or (), seeds=_seeds(seeds), arms=_names(arms), output=output, as_json=as_json)
        return
    try:
        result = sweep_study(
            study, overrides=overrides or (), seeds=_seeds(seeds), arms=_names(arms), launcher=launcher, jobs=jobs,
            output=output, overwrite=overwrite, options=read_options(slurm or ()),
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        print(f"featcl: interrupted; {stopped or 'nothing was running yet'}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(result.to_json())
    elif result.table is not None:
        result.table.print()
    for line in result.complaints():
        print(f"featcl: {line}", file=sys.stderr)
    if not result.complete:
        raise typer.Exit(2)


def _dry_sweep(study: Path, overrides: Sequence[str], *, as_json: bool, arms: list[str] | None, **which: Any) -> None:
    """Exit 2 where something is missing, after all of it has been named."""
    from featcl.studies.arms import chosen_arms, study_arms
    from featcl.studies.dry_run import dry_run, dry_table
    from featcl.studies.sweep import planned

    runs = [dry_run(run.config) for run in planned(chosen_arms(study_arms(study, overrides), arms), **which)]
    if as_json:
        _print_json([run.to_json() for run in runs])
    else:
        print(dry_table(runs))
    if missing := list(dict.fromkeys(what for run in runs for what in run.missing)):
        raise FeatclError(f"{study}: {len(missing)} things that it needs are missing: {'; '.join(missing)}")


def finalists(
    study: Study,
    output: Annotated[Path, typer.Option(help="Where the results of the screening lie.")] = Path("results"),
    best: Annotated[int, typer.Option(min=1, help="How many settings along chosen features.")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace configs that lie there.")] = False,
) -> None:
    """After screening: write STUDY_final, the best settings, the best rival and the controls with three seeds each.

    Each at its best rate and that rate's neighbours, on the world that nothing was tuned on.
    """
    from featcl.studies.finalists import finalists as choose
    from featcl.studies.finalists import write_finalists

    chosen = choose(study, output=output, best=best)
    folder = write_finalists(study, chosen, overwrite=overwrite)
    for each in chosen:
        print(f"{each.role:8}{each.score:8.3f}  {each.arm.name}")
    print(f"{folder}: featcl sweep {folder}")


def reproduce(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run: results/<study>/<arm>/seed-<n>.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Where machine or software differ: |now - was| / max(1, |was|).")
    ] = 0.02,
    as_json: Json = False,
) -> None:
    """Run a finished run again from its config.json and compare the numbers; exit 1 where they differ.

    On the same kind of CPU, with the same versions, they must be the same to the last bit.
    """
    from featcl.studies.reproduce import reproduce as reproduce_run

    found = reproduce_run(run_dir, tolerance=tolerance)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found)
    if not found.same:
        raise typer.Exit(1)


def _seeds(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise FeatclError(f"--seeds {text!r}: give whole numbers such as 0,1,2") from None


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
