"""Tables of finished cells. One block per teacher, evaluation set, protocol and precision: these are never mixed. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

Rule = Literal["last", "best-on-test"]


@dataclass(frozen=True)
class Block:
    """Results that can be compared with each other.

    frame: one row per method and settings, one column per bit width (widest first), cells "mean ± sd" over seeds, or "" where nothing is done.
    """

    title: str
    frame: pd.DataFrame
    notes: list[str]


def load_frame(results: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per finished cell, accuracies in percent, seconds of its own and its share-free total (own + shared)."""
    return pd.DataFrame(
        {
            "id": r["id"],
            "method": r["cell"]["label"],
            "fidelity": r["cell"]["fidelity"],
            "teacher": r["cell"]["teacher"]["label"],
            "weights": r["cell"]["teacher"]["weights_sha256"],
            "teacher_top1": r["teacher"]["top1"],
            "evaluation": r["cell"]["evaluation"]["name"],
            "digest": r["cell"]["identity"]["evaluation"],
            "images": r["images"],
            "protocol": r["cell"]["protocol"],
            "rules": str(sorted(r["cell"]["identity"]["protocol"].items())),
            "precision": r["cell"]["precision"],
            "bits": r["cell"]["bits"],
            "seed": r["cell"]["seed"],
            "top1": r["top1"],
            "best": r["best"]["top1"],
            "evaluations": r["evaluations"],
            "steps": r["steps"],
            "batch": r["cell"]["identity"]["config"].get("batch_size"),
            "seconds": r["seconds"]["own"] + r["seconds"]["shared"],
            "device": r["provenance"]["device_name"],
        }
        for r in results
    )


def blocks(results: list[dict[str, Any]], rule: Rule = "last") -> list[Block]:
    """Tables of top-1 accuracy under one reporting rule."""
    frame = load_frame(results)
    if frame.empty:
        return []
    value = "top1" if rule == "last" else "best"
    # a set is what its content says, and a teacher its weights: names are only what somebody called them
    keys = ["weights", "digest", "protocol", "precision"]
    return [_block(group.reset_index(drop=True), value, rule) for _, group in frame.groupby(keys, sort=True)]


def _block(group: pd.DataFrame, value: str, rule: Rule) -> Block:
    first = group.iloc[0]
    on = f"{first.teacher} on {first.evaluation} ({first.images} images)"
    title = f"{on}: teacher {first.teacher_top1:.2f} %, protocol {first.protocol}, {first.precision}"
    # what a method declares about ranges or BN changes the protocol's rules for its own rows: they are marked, not mixed silently
    usual = group.rules.mode()[0]
    marks = {rules: "" if rules == usual else "*" * (i + 1) for i, rules in enumerate(r for r in group.rules.unique() if r != usual)} | {usual: ""}
    group = group.assign(row=group.method + group.rules.map(marks), batch=group.batch.fillna(0).astype(int))
    widths = sorted(group.bits.unique(), reverse=True)
    by_method = group.groupby(["row", "steps", "batch"], sort=True)
    rows = []
    for (name, steps, batch), cells in by_method:
        row = {"method": name, "follows": cells.fidelity.iloc[0], "steps x batch": f"{steps} x {batch}" if steps else "none", "seeds": _seeds(cells)}
        for width in widths:
            row[width] = _mean_sd(cells[cells.bits == width][value])
        row["seconds/cell"] = f"{cells.seconds.mean():.0f}"
        rows.append((cells[value].mean(), row))
    ordered = pd.DataFrame([row for _, row in sorted(rows, key=lambda pair: pair[0])]).set_index("method")
    return Block(title, ordered, _notes(group, rule, marks))


def _seeds(cells: pd.DataFrame) -> str:
    counts = sorted(cells.groupby("bits").seed.nunique().unique())
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def _mean_sd(values: pd.Series[float]) -> str:
    if values.empty:
        return "-"
    return f"{values.mean():.2f} ± {values.std():.2f}" if len(values) > 1 else f"{values.mean():.2f}"


def _notes(group: pd.DataFrame, rule: Rule, marks: dict[str, str]) -> list[str]:
    about = {
        "last": "the last epoch's accuracy, as a user without test labels would get it",
        "best-on-test": "the best of all evaluated epochs, chosen on the test labels (optimistic; at most as many choices as evaluations)",
    }[rule]
    error = (group.top1 / 100 * (1 - group.top1 / 100) / group.images).pow(0.5).max() * 100
    notes = [
        f"top-1 in %, rule '{rule}': {about}",
        f"± is the standard deviation over seeds; one standard error from the size of the test set is at most {error:.2f}",
        f"seconds/cell on {', '.join(sorted(group.device.unique()))}, images included",
    ]
    usual = next(rules for rules, mark in marks.items() if not mark)
    for rules, mark in marks.items():
        if mark:
            notes.append(f"{mark} the method's own rules: {_difference(rules, usual)}")
    return notes


def _difference(rules: str, usual: str) -> str:
    """`ranges mse (protocol: ema)`: the entries in which two printed rule lists differ."""
    import ast

    own, theirs = dict(ast.literal_eval(rules)), dict(ast.literal_eval(usual))
    return ", ".join(f"{key} {own[key]} (protocol: {theirs[key]})" for key in own if own[key] != theirs[key])


def markdown(found: list[Block]) -> str:
    """GitHub tables, each under its title, notes below."""
    parts = []
    for block in found:
        frame = block.frame.reset_index()
        head = "| " + " | ".join(frame.columns) + " |\n|" + "|".join("---" if c in ("method", "follows") else "---:" for c in frame.columns) + "|"
        body = "\n".join("| " + " | ".join(str(v) for v in row) + " |" for row in frame.itertuples(index=False))
        parts.append(f"**{block.title}**\n\n{head}\n{body}\n\n" + "\n".join(f"- {note}" for note in block.notes))
    return "\n\n".join(parts) + "\n"
