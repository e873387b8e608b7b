"""The main job: a model learns from a stream, and what it learns and forgets is measured all the time.

`featcl.run(config)` works because this module can be called; `featcl.run.RunResult` is what it returns.
"""

from __future__ import annotations

import sys
import types

from featcl.build import build
from featcl.build.methods import own_files
from featcl.build.reuse import Reuse
from featcl.config import RunConfig
from featcl.evaluation.result import RunResult
from featcl.plan import (
    BeginTask,
    CheckCanaries,
    EndTask,
    Evaluate,
    MeasureMemory,
    Memorize,
    Smoke,
    StartAgain,
    Update,
    plan,
)
from featcl.session import Session
from featcl.tracking.folder import RunFolder, stopping_cleanly
from featcl.tracking.interrupt import Interruptible
from featcl.tracking.progress import say, waiting


def run(config: RunConfig, *, overwrite: bool = False, reuse: Reuse | None = None) -> RunResult:
    """Learn from the stream of a config; write `results/<study>/<arm>/seed-<n>/`.

    A finished run of the same config is returned as it is; one that was interrupted goes on where it stopped, to the
    same final numbers.

    Args:
        config: What to run.
        overwrite: Start anew, and replace what lies in the folder whatever config it belongs to.
        reuse: What earlier runs of this process have worked out, for one process that makes many.

    Raises:
        FeatclError: Bad input; the folder holds the results of another config; the disk is full, with the state saved.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, with the state saved.
    """
    folder = RunFolder(config.folder, config.to_dict(), digest=config.digest, overwrite=overwrite)
    with folder, stopping_cleanly(folder.path), Interruptible() as interrupt:
        if folder.finished:
            say(f"{folder.path} holds this run, finished; --overwrite would run it again")
            return RunResult.load(folder.path)
        with waiting("loading the model, selecting features, attaching the adapter"):
            files = own_files(folder.path, resumed=folder.state is not None)
            experiment = build(config, quarantine=folder.path / "quarantine.jsonl", files=files, reuse=reuse)
        with Session(experiment, folder, interrupt) as session:
            for step in session.remaining(plan(experiment)):
                match step:
                    case Memorize():
                        session.memorize()
                    case MeasureMemory():
                        session.measure_memory(step.when)
                    case StartAgain():
                        session.start_again()
                    case BeginTask():
                        session.begin_task(step)
                    case Update():
                        session.learn(step)
                    case CheckCanaries():
                        session.check_canaries()
                    case Smoke():
                        session.smoke()
                    case EndTask():
                        session.end_task(step)
                    case Evaluate():
                        session.evaluate(step.row)
            return session.finish()


class _CallableModule(types.ModuleType):
    """`featcl.run` is a module and, since the name is also the function's, callable as that function."""

    def __call__(self, config: RunConfig, *, overwrite: bool = False, reuse: Reuse | None = None) -> RunResult:
        return run(config, overwrite=overwrite, reuse=reuse)


sys.modules[__name__].__class__ = _CallableModule
