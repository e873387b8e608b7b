"""What `featcl run` says: a small run as it should be, mistyped, interrupted, killed and resumed.

    python scripts/docs/transcripts.py            writes docs/transcripts/*.txt, which docs/terminal.md shows

A test runs the same and compares what `normalised` leaves of both.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "transcripts"
ENOUGH = 600.0  # seconds, on a busy machine


class Terminal:
    """A folder in which commands are typed one after the other.

    Args:
        folder: Where they run; it gets the config `demo.yaml`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(FOLDER / "demo.yaml", folder)

    def types(self, line: str, *, stop: signal.Signals | None = None, updates: int = 2) -> str:
        """What the terminal shows: the line, what comes of it, and the exit code where it is not 0.

        Args:
            line: A `featcl` command.
            stop: A signal that the command gets once it has recorded so many updates of its run.
            updates: How many.
        """
        screen = self.folder / "screen.txt"
        arm = next((word.removeprefix("arm=") for word in shlex.split(line) if word.startswith("arm=")), "demo")
        metrics = self.folder / "results" / "demo" / arm / "seed-0" / "metrics.jsonl"
        before = _updates(metrics)
        child = _forked(lambda: _featcl(line), screen, self.folder)
        typed, seen = "", 0
        if stop is not None:
            _wait_until(lambda: _updates(metrics) >= before + updates, child)
            typed, seen = ("^C\n" if stop is signal.SIGINT else ""), len(screen.read_text(encoding="utf-8"))
            os.kill(child, stop)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        shown = {0: "", -signal.SIGKILL: "Killed\n"}.get(code, f"[exit code {code}]\n")
        said = screen.read_text(encoding="utf-8")
        return f"$ {line}\n{said[:seen]}{typed}{said[seen:]}{shown}"


def run_transcript(terminal: Terminal) -> str:
    """A run, and what the same command says once it is finished."""
    return terminal.types("featcl run demo.yaml")


def typo_transcript(terminal: Terminal) -> str:
    """A misspelt key, a wrong value and a file that is not there."""
    lines = ("learner.stepps=2", "adapter.kind=bth", "features.sae=lab/olmo2/resid_post_9")
    shown = [terminal.types(f"featcl run demo.yaml {line}") for line in lines]
    return "\n".join([*shown, terminal.types("featcl run dmo.yaml")])


def killed_transcript(terminal: Terminal) -> str:
    """Ctrl-C, then kill -9, then to the end."""
    line = "featcl run demo.yaml arm=stopped"
    stops: tuple[signal.Signals | None, ...] = (signal.SIGINT, signal.SIGKILL, None)
    return "\n".join(terminal.types(line, stop=stop) for stop in stops)


TRANSCRIPTS: dict[str, Callable[[Terminal], str]] = {
    "run": run_transcript,
    "typo": typo_transcript,
    "killed": killed_transcript,
}


def normalised(text: str) -> str:
    """A transcript without what depends on the machine, the instant and the laboratory's weights.

    Scores become 0.0, the number of updates before an interruption 0; what was learned from at that instant, column
    widths and spaces at line ends go.
    """
    text = re.sub(r", while learning from '[^']*'", "", text)
    text = re.sub(r"(?<=going on after )\d+(?= updates)", "0", text)
    text = re.sub(r"[+-]?\d+\.\d+", "0.0", text)
    text = re.sub(r"[━─]+", "─", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def _featcl(line: str) -> None:
    from featcl import cli

    sys.argv = shlex.split(line)
    cli.main()


def _forked(do: Callable[[], None], screen: Path, folder: Path) -> int:
    """Start `do` in a process of its own, in a folder, with its output in a file; returns the process's id.

    A fork has what is imported here already, so that a transcript of ten commands does not import ten times.
    """
    import torch

    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            out = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (  # line by line, as on a terminal
                open(number, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
                for number in (1, 2)
            )
            os.environ |= {"CI": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
            os.chdir(folder)
            torch.set_num_threads(1)
            do()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:  # noqa: BLE001 (the process ends here)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _updates(metrics: Path) -> int:
    return metrics.read_text(encoding="utf-8").count('"kind": "update"') if metrics.is_file() else 0


def _wait_until(what: Callable[[], bool], child: int) -> None:
    end = time.monotonic() + ENOUGH
    while not what():
        if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() > end:
            raise RuntimeError("the run ended before it could be stopped")
        time.sleep(0.005)


def main() -> None:
    """Write them all."""
    import featcl.build
    import featcl.features.saelens

    featcl.features.saelens.require_sae_lens()  # imported before the forks
    for name, made in TRANSCRIPTS.items():
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{name}.txt").write_text(made(Terminal(Path(folder))), encoding="utf-8")
        print(f"{FOLDER / name}.txt")


if __name__ == "__main__":
    main()
