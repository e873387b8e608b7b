"""Choose the best trial of every arm: `python scripts/tune.py experiments/rivals_tuning experiments/rivals`.

    featcl sweep experiments/rivals_tuning                      the trials; what is finished is not run again
    python scripts/tune.py experiments/rivals_tuning experiments/rivals
    featcl sweep experiments/rivals --seeds 0,1,2               the arms, with what was chosen
    featcl table experiments/rivals                             with a column of trials

Writes the values into the arms' files and what was tried into `tuning.json`; see `featcl.studies.tuning`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from featcl.config import ConfigError
from featcl.errors import FeatclError
from featcl.studies.tuning import CRITERION, tune


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path, help="folder of trials, one file for each arm")
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--output", help="where the trials wrote, in place of the configs' output")
    parser.add_argument("--failed", action="store_true", help="trials that have not finished count as failed")
    given = parser.parse_args()
    try:
        tuning = tune(given.trials, given.study, output=given.output, failed=given.failed)
    except (FeatclError, ConfigError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    print(f"best by {CRITERION}, world {tuning.world}, seeds {', '.join(map(str, tuning.seeds))}")
    for name, arm in tuning.arms.items():
        values = ", ".join(f"{key} {value}" for key, value in arm.chosen.items())
        best = max(trial.score for trial in arm.trials if trial.score is not None)
        edge = f"; at the edge: {', '.join(arm.at_edge)}" if arm.at_edge else ""
        print(f"{name:24} {len(arm.trials)} trials  {best:+.3f}  {values}{edge}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
