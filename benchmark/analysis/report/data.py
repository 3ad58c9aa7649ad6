"""Everything about every cell, as the page holds it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from dfqbench.analysis.cost import clock_of, seconds_of
from dfqbench.analysis.plots.drawn import Drawn
from dfqbench.analysis.records import read_history, said_of
from dfqbench.analysis.report.assets import Assets
from dfqbench.analysis.report.keytable import place_of_cells
from dfqbench.analysis.size import gigabops, megabytes, sizes_of, text_of, three_digits
from dfqbench.analysis.tables.without_data import nats
from dfqbench.metrics import DENSE, metric_of
from dfqbench.sweep.cell import without_data
from dfqbench.sweep.reproduce import recipe

LOG_LINES = 20
POINTS, FEWEST = 60, 12  # of a curve
POINTS_IN_ALL = 60_000  # of the curves of a page: many cells have fewer each
SAMPLES = "samples.png"
OPENED = ("student.safetensors", "log.txt", "history.csv", "result.json")
SHEET_SIDE = 420  # pixels


class Data:
    """What the page's script needs about every cell; whatever several cells share is stored once."""

    def __init__(self, drawn: Drawn, assets: Assets, root: str | None):
        """root: the results folder as seen from the page, whose files cells then link to; None where the page does not lie in it."""
        self.reading, self.assets, self.root = drawn.reading, assets, root
        self._places = place_of_cells(drawn)
        self._shared: dict[str, int] = {}
        self._values: list[Any] = []
        self._sheets: dict[str, int | None] = {}
        self._images: list[str] = []
        self._room: Counter[str] = Counter()
        self.captions: dict[int, str] = {}
        self.left_out = 0
        lost = [*self.reading.unfinished, *self.reading.unfinished_without_data]
        self._said = {failure["id"]: said_of(failure) for failure in self.reading.failures}
        self._points = max(FEWEST, min(POINTS, POINTS_IN_ALL // max(len(self.reading.finished), 1)))
        self.cells = [self._cell(result) for result in sorted([*self.reading.finished, *lost], key=_table_order)]

    def _share(self, value: Any) -> int:
        key = json.dumps(value, sort_keys=True)
        if key not in self._shared:
            self._shared[key] = len(self._values)
            self._values.append(value)
        return self._shared[key]

    def _cell(self, r: dict[str, Any]) -> dict[str, Any]:
        cell, folder = r["cell"], self.reading.store.folder(r["id"])
        known = {
            "id": r["id"],
            "row": self._places.get(r["id"]),
            "method": cell["label"],
            "bits": cell["bits"],
            "seed": cell["seed"],
            "teacher": cell["teacher"]["label"],
            "evaluation": cell["evaluation"]["name"],
            "protocol": cell["protocol"],
            "precision": cell["precision"],
            "on": _on(cell),
            "config": self._share(cell["identity"]["config"]),
            "log": _tail(folder / "log.txt"),
            "files": self._share(_files(folder)),
        }
        if "status" in r:
            return known | {"status": r["status"], "said": self._said.get(r["id"], "")}
        history = read_history(folder / "history.csv", self._points)
        curve = {name: _thinned(history[name], self._points) for name in ("epoch", "top1", "miou", "ap", "agreement", "loss") if name in history}
        clock = clock_of([r])
        return known | {
            **_scores(r),
            "last_epoch": r["last_epoch"],
            "seconds": round(seconds_of(r, clock), 3),
            "clock": clock,
            **{part: round(r["cpu_seconds" if clock == "CPU" else "seconds"][part], 3) for part in ("own", "shared")},
            **_size(r),
            **({"warnings": [f"{sign['text']} (epoch {sign['epoch']})" for sign in r["warnings"]]} if r.get("warnings") else {}),
            "curve": curve,
            "provenance": self._share({k: v for k, v in r["provenance"].items() if v is not None}),
            "recipe": self._share(recipe(r)),
            "images": self._sheets_of(folder, f"{cell['label']}, {cell['teacher']['label']} {_on(cell)}, seed {cell['seed']}"),
            "replicates": [_replicate(other, r) for other in self.reading.replicates.get(r["id"], [])],
        }

    def _sheets_of(self, folder: Path, caption: str) -> list[int]:
        """The numbers of a cell's sheets of images, what they show of its last batch first, as far as there is room."""
        files = sorted(folder.glob("*.png"), key=lambda path: (path.name != SAMPLES, path.name))
        numbers = [self._sheet(path, caption if path.name == SAMPLES else f"{caption}: {path.stem}") for path in files]
        return [number for number in numbers if number is not None]

    def _sheet(self, path: Path, caption: str) -> int | None:
        """None where it is no picture, or there is no room for one more. Cells that ran in lockstep share theirs."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        key = hashlib.sha256(content).hexdigest()
        if key not in self._sheets:
            if self._room[path.name] >= self.assets.sheets:
                self.left_out += path.name == SAMPLES
                return None
            small = _small(content)
            self._sheets[key] = len(self._images) if small else None
            if small:
                self._room[path.name] += 1
                self.captions |= {len(self._images): caption} if path.name == SAMPLES else {}
                self._images.append(self.assets.image(small, "webp"))
        return self._sheets[key]

    def json(self) -> str:
        """Safe inside a script element."""
        content = {"cells": self.cells, "shared": self._values, "images": self._images, "root": self.root}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _files(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of what a cell keeps for people to open."""
    found = [path for path in (folder / name for name in OPENED) if path.is_file()]
    found += sorted(folder.glob("*.png"))
    return [(path.name, path.stat().st_size) for path in found]


def _on(cell: dict[str, Any]) -> str:
    return "without data" if without_data(cell) else f"on {cell['evaluation']['name']}"


def _scores(r: dict[str, Any]) -> dict[str, Any]:
    """A cell without data has no accuracy and no drop, and the others no agreement."""
    if not without_data(r["cell"]):
        top1, of_teacher = r["top1"], r["teacher"]["top1"]
        scores = {"top1": top1, "best": r["best"]["top1"], "teacher_top1": of_teacher, "drop": of_teacher - top1}
        return {name: round(value, 4) for name, value in scores.items()} | {"best_epoch": r["best"]["epoch"]} | _named(r)
    plain, made = r.get("plain_rounding"), r["cell"]["evaluation"].get("made", "unknown")
    rounding = f"plain rounding: {plain['agreement']:.2f} %, KL {nats(plain['kl'])}" if plain else "plain rounding is not possible"
    said = f"no accuracy: agreement with the teacher on {r['images']} synthetic images ({made})"
    return {"agreement": round(r["agreement"], 4), "kl": r["kl"], "kl_text": nats(r["kl"]), "agreement_text": said, "plain_text": rounding}


def _named(r: dict[str, Any]) -> dict[str, Any]:
    """Of dense tasks: what the score is called, and what was measured beside it."""
    metric = metric_of(r)
    if metric.key not in DENSE:
        return {}
    beside = [[f"{r[key]:.2f} %", name] for key, name in metric.beside.items() if isinstance(r.get(key), float)]
    classes = [[f"{score:.1f} %", f"{metric.name} of {name}"] for name, score in r.get("per_class", {}).items() if score is not None]
    return {"metric": metric.name, "beside": beside + classes}


def _size(r: dict[str, Any]) -> dict[str, Any]:
    """For the table of cells, and as (value, what it is) for the panel of one; nothing where an earlier version wrote the result."""
    sizes = sizes_of(r)
    if sizes is None:
        return {}
    mb, gbops = ([of(its) for its in (sizes.student, sizes.teacher)] for of in (megabytes, gigabops))
    size = f"{text_of('compression', sizes)} smaller than the teacher's {three_digits(mb[1])} MB, {text_of('weight-bits', sizes)} bits/weight"
    work = f"of work per image; the teacher has {three_digits(gbops[1])}"
    facts = [[f"{three_digits(mb[0])} MB", size], [f"{three_digits(gbops[0])} GBOPs", work]]
    return {"mb": float(f"{mb[0]:.4g}"), "gbops": float(f"{gbops[0]:.4g}"), "facts": facts}


def _table_order(r: dict[str, Any]) -> tuple[Any, ...]:
    cell = r["cell"]
    return (
        cell["teacher"]["label"],
        cell["evaluation"]["name"],
        cell["protocol"],
        cell["precision"],
        cell["label"],
        cell["bits"],
        cell["seed"],
        r["id"],
    )


def _thinned(values: list[Any], points: int) -> list[float | None]:
    """Of a curve, about as many as `points` and the last; five digits of each."""
    step = max(1, len(values) // points)
    return [float(f"{value:.5g}") if isinstance(value, float) else None for value in [*values[:-1:step], *values[-1:]]]


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""


def _replicate(other: dict[str, Any], own: dict[str, Any]) -> tuple[str, str]:
    on = other["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(on.get("packages", {}).items()) if name in ("torch", "dfqbench"))
    metric = metric_of(own).key
    return f"{other[metric]:.2f} % ({other[metric] - own[metric]:+.2f})", f"{on['device_name']}, {versions}, commit {str(on.get('git'))[:12]}"


def _small(content: bytes) -> bytes | None:
    """A sheet shrunk and compressed for the page; None if it is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError):
        return None
    picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=60, method=4)
    return buffer.getvalue()
