"""Everything about every cell, as the page holds it."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from pathlib import Path
from typing import Any

from dfqbench.analysis.cost import clock_of, seconds_of
from dfqbench.analysis.plots.drawn import Drawn
from dfqbench.analysis.records import Reading, read_history
from dfqbench.analysis.size import gigabops, megabytes, sizes_of, text_of, three_digits
from dfqbench.analysis.tables.without_data import nats
from dfqbench.errors import counted
from dfqbench.sweep.cell import without_data
from dfqbench.sweep.reproduce import recipe

PAGE = Path(__file__).parent / "page"
LOG_LINES = 20
POINTS = 60  # of a curve
SHEETS = 48  # sheets of synthetic images that are embedded; equal ones count once
SHEET_SIDE = 420  # pixels


class Data:
    """What the page's script needs about every cell; whatever several cells share is stored once."""

    def __init__(self, reading: Reading, drawn: Drawn):
        self.reading = reading
        self._shared: dict[str, int] = {}
        self._values: list[Any] = []
        self._sheets: dict[str, int] = {}
        self._images: list[str] = []
        self._captions: list[str] = []
        self.left_out = 0
        self.cells = [self._cell(result) for result in sorted(reading.finished, key=_table_order)]

    def _share(self, value: Any) -> int:
        key = json.dumps(value, sort_keys=True)
        if key not in self._shared:
            self._shared[key] = len(self._values)
            self._values.append(value)
        return self._shared[key]

    def _cell(self, r: dict[str, Any]) -> dict[str, Any]:
        cell, folder = r["cell"], self.reading.store.folder(r["id"])
        history = read_history(folder / "history.csv", POINTS)
        curve = {name: [_rounded(v) for v in history.get(name, [])] for name in ("epoch", "top1", "agreement", "loss") if name in history}
        clock = clock_of([r])
        provenance = {k: v for k, v in r["provenance"].items() if v is not None}
        return {
            "id": r["id"],
            "method": cell["label"],
            "bits": cell["bits"],
            "seed": cell["seed"],
            "teacher": cell["teacher"]["label"],
            "evaluation": cell["evaluation"]["name"],
            "protocol": cell["protocol"],
            "precision": cell["precision"],
            "on": _on(cell),
            **_scores(r),
            "last_epoch": r["last_epoch"],
            "seconds": round(seconds_of(r, clock), 3),
            "clock": clock,
            **{part: r["cpu_seconds" if clock == "CPU" else "seconds"][part] for part in ("own", "shared")},
            **_size(r),
            "curve": curve,
            "config": self._share(cell["identity"]["config"]),
            "provenance": self._share(provenance),
            "recipe": self._share(recipe(r)),
            "log": _tail(folder / "log.txt"),
            "images": self._sheet(folder / "samples.png", f"{cell['label']}, {cell['teacher']['label']} {_on(cell)}, seed {cell['seed']}"),
            "replicates": [_replicate(other, r) for other in self.reading.replicates.get(r["id"], [])],
        }

    def _sheet(self, path: Path, caption: str) -> int | None:
        """The index of a sheet of images; None where there is none, or no room for one more. Cells that ran in lockstep share theirs."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        key = hashlib.sha256(content).hexdigest()
        if key in self._sheets:
            return self._sheets[key]
        if len(self._images) >= SHEETS:
            self.left_out += 1
            return None
        small = _small(content)
        if small is None:
            return None
        self._sheets[key] = len(self._images)
        self._images.append("data:image/webp;base64," + base64.b64encode(small).decode())
        self._captions.append(caption)
        return self._sheets[key]

    def gallery(self) -> str:
        """One sheet per method, settings, teacher and seed, as far as there is room."""
        if not self._images:
            return "<p>No cell made images.</p>"
        sheets = [
            f'<figure><figcaption>{html.escape(caption)}</figcaption><img data-image="{i}" alt="synthetic images of {html.escape(caption)}"></figure>'
            for i, caption in enumerate(self._captions)
        ]
        more = f"<p>{counted(self.left_out, 'cell')} more have sheets: runs/&lt;cell&gt;/samples.png.</p>" if self.left_out else ""
        return f'<p>What the last batch of a run looked like, each under its class.</p><div class="gallery">{"".join(sheets)}</div>{more}'

    def json(self) -> str:
        """Safe inside a script element."""
        text = json.dumps({"cells": self.cells, "shared": self._values, "images": self._images}, ensure_ascii=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


def _on(cell: dict[str, Any]) -> str:
    return "without data" if without_data(cell) else f"on {cell['evaluation']['name']}"


def _scores(r: dict[str, Any]) -> dict[str, Any]:
    """A cell without data has no accuracy and no drop, and the others no agreement."""
    if not without_data(r["cell"]):
        top1, of_teacher = r["top1"], r["teacher"]["top1"]
        scores = {"top1": top1, "best": r["best"]["top1"], "teacher_top1": of_teacher, "drop": of_teacher - top1}
        return {name: round(value, 4) for name, value in scores.items()} | {"best_epoch": r["best"]["epoch"]}
    plain, made = r.get("plain_rounding"), r["cell"]["evaluation"].get("made", "unknown")
    rounding = f"plain rounding: {plain['agreement']:.2f} %, KL {nats(plain['kl'])}" if plain else "plain rounding is not possible"
    said = f"no accuracy: agreement with the teacher on {r['images']} synthetic images ({made})"
    return {"agreement": round(r["agreement"], 4), "kl": r["kl"], "kl_text": nats(r["kl"]), "agreement_text": said, "plain_text": rounding}


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


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else None


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""


def _replicate(other: dict[str, Any], own: dict[str, Any]) -> tuple[str, str]:
    on = other["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(on.get("packages", {}).items()) if name in ("torch", "dfqbench"))
    metric = "agreement" if without_data(own["cell"]) else "top1"
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
