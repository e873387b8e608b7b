"""Write the conversations that the shipped bundles contrast on the lab models: featcl/features/bundles/lab.yaml.

python scripts/lab/bundle_texts.py
"""

from __future__ import annotations

from pathlib import Path

import yaml

from featcl import files
from featcl.lab.factors import factor_pairs

FACTORS = ("emotions", "relationships", "communication-style", "design", "syntax-style", "engineering-behaviour")
COUNT = 32  # of each side
TARGET = Path(__file__).resolve().parents[2] / "featcl" / "features" / "bundles" / "lab.yaml"
HEADER = "# Made by scripts/lab/bundle_texts.py from featcl.lab.factors; one conversation a line, its turns in order.\n"


def content() -> str:
    """The file's text."""
    lines = [HEADER]
    for factor in FACTORS:
        lines.append(f"{factor}:\n")
        for side, conversations in zip(("positive", "negative"), factor_pairs(factor, COUNT, seed=1), strict=True):
            lines.append(f"  {side}:\n")
            for conversation in conversations:
                turns = {message["role"]: message["content"] for message in conversation}
                line = yaml.safe_dump(turns, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
                lines.append(f"    - {line}")
    return "".join(lines)


if __name__ == "__main__":
    files.write_text(TARGET, content())
