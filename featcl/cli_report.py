"""Commands that show what runs measured: report, table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from featcl.errors import FeatclError
from featcl.files import require_file

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def add_report_commands(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (report, table):
        app.command()(command)


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs.")],
    reference: Annotated[
        list[str] | None, typer.Option(metavar="NAME=RUN_DIR", help="joint=…, in_context=…; may be repeated.")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Of several runs: where the comparison goes.")] = None,
    as_json: Json = False,
) -> None:
    """Rebuild a run's report.html, plots and report card from its files alone; several runs are also compared."""
    if out is not None:
        require_file(out)
    from featcl.studies.report import report_runs

    found = report_runs(run_dirs, references=dict(map(_named, reference or ())), out=out)
    if as_json:
        _print_json(found.to_json())
    else:
        print(found)


def table(
    study: Annotated[Path, typer.Argument(help="The study's folder of configs, such as experiments/quickstart.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="With which the study was swept.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the results lie.")] = Path("results"),
    rival: Annotated[
        str | None, typer.Option(metavar="ARM", help="Compare all with this at matched acquisition and ‖ΔW‖.")
    ] = None,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")] = None,
    as_json: Json = False,
) -> None:
    """Put the finished arms of a study side by side, with intervals and paired differences from the first.

    Also as table.json and table.md in the study's folder of results.
    """
    if html is not None:
        require_file(html)
    from featcl.studies.table import study_table

    result = study_table(study, output=output, overrides=overrides or ())
    result.write(output / result.study)
    if html is not None:
        result.write_page(html)
    matched = None
    if rival is not None:
        from featcl.studies.statistics import study_statistics

        matched = study_statistics(result.runs, rival=rival)
    if as_json:
        _print_json(result.rows if matched is None else {"rows": result.rows, "matched": matched.to_json()})
        return
    result.print()
    if matched is not None:
        print(matched)
    if html is not None:
        print(f"page: {html}")


def _named(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise FeatclError(f"--reference {text!r}: give a name and a run's folder, such as joint=results/s/joint/seed-0")
    return name, Path(folder)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
