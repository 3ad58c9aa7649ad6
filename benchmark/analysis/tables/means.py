"""What is said over rows and tables as a whole: how methods rank, and every mean with all that is known of it, for programs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dfqbench.analysis.stats import average_ranks
from dfqbench.analysis.tables.blocks import Block, Entry, Row
from dfqbench.analysis.tables.printed import Written
from dfqbench.metrics import METRICS


def ranking(found: Sequence[Block]) -> list[str]:
    """What the average ranks say of the rows that are in every column of every block; nothing for fewer than three columns or two such rows.

    Yardsticks, which are no data-free methods, are left aside.
    """
    found = [block for block in found if not block.yardstick]
    columns = [{(r.label, r.budget): entry.mean for r in block.rows if (entry := r.complete(w))} for block in found for w in block.widths]
    columns, every = [column for column in columns if column], {(r.label, r.budget) for block in found for r in block.rows}
    common = sorted(name for name in every if all(name in column for column in columns))
    if len(columns) < 3 or len(common) < 2:
        return []
    ranks = average_ranks(np.array([[column[name] for name in common] for column in columns]))
    average = sorted(zip(ranks.average, common, strict=True), key=lambda pair: pair[0])
    left_out = "; ".join(sorted({label for label, _ in every.difference(common)}))  # labels have commas
    told = f"ranks further apart than {ranks.critical_difference:.2f} differ (Nemenyi, 5 %)"
    told += f"; Friedman's p that all are equal: {ranks.p:.2g}" if len(common) > 2 else ""
    lines = [f"average rank over {len(columns)} columns (1 is best): {'; '.join(f'{label} {rank:.2f}' for rank, (label, _) in average)}", told]
    return lines + [f"not ranked, as they are not in every column with all their seeds: {left_out}"] * bool(left_out)


def means_frame(found: Sequence[Block], without_data: Sequence[Written] = ()) -> pd.DataFrame:
    """One line per row and bit width, with everything that is known about it; accuracies in percent. n: finished cells, seeds: theirs."""
    lines = []
    for block, row, width in ((its, row, width) for its in found for row in its.rows for width in its.widths):
        entry, line = row.entries.get(width), line_of(vars(block), row, width)
        if entry:
            interval, against, claim = entry.estimate, entry.against_best, entry.published
            distance = round(claim.distance(entry.mean) / entry.error, 2) if claim and entry.error else None
            line |= {block.metric.key: entry.mean, "sd": entry.sd, "low": interval and interval.low}
            line |= {"high": interval and interval.high, "drop": entry.drop, "best": entry.best, "below_best": against and -against.value}
            line |= {"p_holm": against and float(f"{against.p:.3g}"), "published": claim and str(claim), "from_published_in_se": distance}
            line |= costs_of(entry)
        lines += [line] * bool(entry or width in row.lost)
    lines += [line for table in without_data for line in table.means]
    return (
        pd.DataFrame(lines).astype({"steps": "Int64"}).round(dict.fromkeys((*METRICS, "sd", "low", "high", "drop", "below_best", "agreement_sd"), 4))
    )


def line_of(place: Mapping[str, Any], row: Row, width: str) -> dict[str, Any]:
    """The beginning of a line of `means_frame`. place: what the table has of its cells."""
    entry, lost = row.entries.get(width), row.lost.get(width)
    line = {name: place[name] for name in ("teacher", "evaluation", "protocol", "precision", "yardstick")}
    line |= {"method": row.label + row.mark, "follows": row.fidelity, "steps": row.steps, "batch": row.batch, "bits": width}
    line |= {"n": len(entry.ids) if entry else 0, "diverged": lost.diverged if lost else 0, "failed": lost.failed if lost else 0}
    return line | ({"seeds": " ".join(map(str, entry.seeds))} if entry else {})


def costs_of(entry: Entry) -> dict[str, Any]:
    """The end of such a line."""
    cost = {"seconds_low": round(entry.cost.low, 3), "seconds_high": round(entry.cost.high, 3), "seconds_of": entry.cost.clock}
    return cost | (entry.sizes.as_columns() if entry.sizes else {})
