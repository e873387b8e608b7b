"""The `featcl` command: reads arguments, calls one room per command, prints what it returns.

Exit codes: 0 done, 2 bad input (one line on standard error; `--debug` anywhere shows the traceback), 130 Ctrl-C.
Rooms are imported inside the commands, so that `featcl --help` is quick.
"""

from __future__ import annotations

import json
import sys
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
Sae = Annotated[str, typer.Option("--sae", help="lab/<model>/resid_post_<L>, or a folder.")]
Texts = Annotated[list[Path] | None, typer.Option("--text", help="A .txt or .txt.gz file; may be repeated.")]
More = Annotated[list[Path] | None, typer.Argument(hidden=True)]  # what a shell pattern after --text expands to


def main() -> None:
    """Entry point: runs the command and turns what can go wrong into an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
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

    result = run_config(RunConfig.load(config, overrides or ()), overwrite=overwrite)
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
def doctor(as_json: Json = False) -> None:
    """Say which versions, device and threads a run would use, and what is missing."""
    from featcl.build import environment

    found = environment()
    if as_json:
        _print_json(found)
        return
    for key, value in found.items():
        for name, version in value.items() if isinstance(value, dict) else {key: value}.items():
            print(f"{name:24} {'missing (optional)' if version is None else version}")


def main_module() -> None:  # pragma: no cover
    main()


if __name__ == "__main__":
    main()
