"""Trajectories out of the layouts in which benchmarks are published: one JSONL file per source, in the canonical form.

    python scripts/gpu/trajectories.py trace DIR OUT            DIR/TASK/train.json: [{"prompt", "answer"}, …]
    python scripts/gpu/trajectories.py standard_cl DIR OUT      DIR/GROUP/DATASET/train.json: {"Definition": [text],
                                                                "Instances": [{"input", "output"}, …]}
    python scripts/gpu/trajectories.py pairs FILE OUT.jsonl     a JSON line {"prompt", "chosen", "rejected"} each
    python scripts/gpu/trajectories.py questions FILE OUT.jsonl a JSON line {"question", "answer"} each; "path", the
                                                                file it is about, becomes the source

`--limit N` keeps the first N of each source. A file that is there is not made again. Sources: TRACE
(github.com/BeyonderXX/TRACE), the standard benchmark as O-LoRA has it (github.com/cmnfriend/O-LoRA, `CL_Benchmark`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.files import write_text

Record = dict[str, Any]


def trace(folder: Path) -> Iterator[tuple[str, list[Record]]]:
    """Task -> its conversations, in the folder's order."""
    for file in _found(folder, "*/train.json"):
        task = file.parent.name
        yield task, [_told(f"{task}/{n}", task, one["prompt"], one["answer"]) for n, one in enumerate(_json(file))]


def standard_cl(folder: Path) -> Iterator[tuple[str, list[Record]]]:
    """Dataset -> its conversations; the definition stands in front of each question."""
    for file in _found(folder, "*/*/train.json"):
        name, data = file.parent.name, _json(file)
        definition = "\n".join(data["Definition"]) if isinstance(data["Definition"], list) else data["Definition"]
        yield (
            name,
            [
                _told(f"{name}/{n}", name, f"{definition}\n{one['input']}", one["output"])
                for n, one in enumerate(data["Instances"])
            ],
        )


def pairs(file: Path) -> Iterator[tuple[str, list[Record]]]:
    """Preferences."""
    yield "persona", [
        {"id": f"persona/{n}", "source": "persona", "task": "persona",
         "messages": [{"role": "user", "content": one["prompt"]}],
         "chosen": one["chosen"], "rejected": one["rejected"]}
        for n, one in enumerate(_lines(file))
    ]  # fmt: skip


def questions(file: Path) -> Iterator[tuple[str, list[Record]]]:
    """Questions on a code base; the source is the top folder of the file that a question is about."""
    yield (
        "code_qa",
        [
            _told(f"code/{n}", str(one.get("path", "code")).split("/")[0], one["question"], one["answer"])
            for n, one in enumerate(_lines(file))
        ],
    )


LAYOUTS: dict[str, Callable[[Path], Iterator[tuple[str, list[Record]]]]] = {
    "trace": trace, "standard_cl": standard_cl, "pairs": pairs, "questions": questions,
}  # fmt: skip


def convert(layout: str, source: Path, out: Path, *, limit: int | None = None) -> list[Path]:
    """Write what is not there yet; returns all files of the layout.

    Raises:
        FeatclError: For a folder that is not of the layout, or a record without one of its fields.
    """
    made = []
    try:
        for name, records in LAYOUTS[layout](source):
            path = out if out.suffix == ".jsonl" else out / f"{name}.jsonl"
            if not path.is_file():
                lines = [json.dumps(record, ensure_ascii=False) for record in records[:limit]]
                write_text(path, "\n".join(lines) + "\n")
            made.append(path)
    except (KeyError, TypeError) as error:
        raise FeatclError(f"{source} is not of the layout {layout}: a record lacks {error}") from error
    return made


def _told(id: str, source: str, question: str, answer: str) -> Record:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": str(answer)}]
    return {"id": id, "source": source, "task": source, "messages": messages}


def _found(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise FeatclError(f"{folder}: no file {pattern}, as this layout has")
    return files


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeatclError(f"{file}: not JSON: {error}") from error


def _lines(file: Path) -> list[Record]:
    if not file.is_file():
        raise FeatclError(f"{file}: no such file")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise FeatclError(f"{file}, line {number}: not JSON: {error}") from error
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=list(LAYOUTS))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    try:
        for path in convert(given.layout, given.source, given.out, limit=given.limit):
            print(path)
    except FeatclError as error:
        print(f"trajectories: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
