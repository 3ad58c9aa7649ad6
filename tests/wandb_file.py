"""Reads back what W&B wrote offline: LevelDB log blocks of 32 KiB behind a header of 7 bytes, records of (crc32, length, type)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, 7


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def contents(path: Path) -> dict[str, Any]:
    """One run: who it is, its configuration, its history (a dictionary per step), its summary and its artifacts."""
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "files": [], "artifacts": []}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run" and "id" not in found:
            run = record.run
            found |= {
                "id": run.run_id,
                "project": run.project,
                "group": run.run_group,
                "job_type": run.job_type,
                "tags": list(run.tags),
                "name": run.display_name,
            }
            found["config"] |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            found["history"].append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            found["summary"] |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update}
        elif kind == "files":
            found["files"] += [file.path for file in record.files.files]
        elif kind == "artifact":
            its = record.artifact
            files = {file.path: (file.size, file.digest, file.local_path) for file in its.manifest.contents}
            found["artifacts"].append({"name": its.name, "type": its.type, "metadata": json.loads(its.metadata), "files": files})
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def runs(root: Path) -> dict[str, dict[str, Any]]:
    """All offline runs of a results folder by id; a second folder of one id is an error."""
    found = [contents(path) for path in sorted((root / "wandb").glob("offline-run-*/run-*.wandb"))]
    assert len({run["id"] for run in found}) == len(found)
    return {run["id"]: run for run in found}
