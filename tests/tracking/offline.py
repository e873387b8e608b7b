"""Reads an offline W&B run's own records back: a LevelDB log of protobufs, without wandb's help but for the schema.

The file starts with `:W&B`, a magic number and a version (7 bytes). Blocks of 32 768 bytes follow (the first one is
shorter by the header); a record is one or more chunks of CRC32 (4 bytes), length (2), kind (1: full, 2: first,
3: middle, 4: last) and data; a block's last few bytes that cannot hold a chunk's header are zero.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK, CHUNK = 7, 32768, 7


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is not an offline run"
    place, whole = HEADER, b""
    while place + CHUNK <= len(data):
        left = BLOCK - place % BLOCK
        if left < CHUNK:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + CHUNK])
        whole += data[place + CHUNK : place + CHUNK + length]
        place += CHUNK + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wait(path: Path, *, seconds: float = 60.0) -> None:
    """Until the run's exit is on disk: W&B's own process writes it, and may be slow on a busy machine."""
    end = time.monotonic() + seconds
    while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < end, f"{path} has no exit record after {seconds} s"
        time.sleep(0.05)


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows: name -> value."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append({_key(item): json.loads(item.value_json) for item in record.history.item})
    return rows


def run(path: Path) -> Any:
    """The record with the run's id, group, job type and config."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")


def metrics(path: Path) -> dict[str, str]:
    """Metric name or pattern -> the metric it is drawn against."""
    kinds = [record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in kinds}


def artifacts(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Name -> (type, name of each file -> where it lies on this machine)."""
    kinds = [record.request.log_artifact.artifact for record in records(path) if _logs_artifact(record)]
    kinds += [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]
    return {
        found.name: (found.type, {entry.path: entry.local_path for entry in found.manifest.contents}) for found in kinds
    }


def _logs_artifact(record: Any) -> bool:
    return record.WhichOneof("record_type") == "request" and record.request.WhichOneof("request_type") == "log_artifact"


def summary(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            values |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
    return values


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
