"""How well the score without data predicts accuracy: KL and agreement of every finished student on images that nothing was trained on.

    python results/reference/no-data-score/measure.py STORE

STORE holds the finished cells of sweep.yaml with their students; the sweep's environment variables are set. Writes scores.csv and correlation.md
beside this file. `noise` (Gaussian) and `real` (256 test images without their labels) show how much the choice of the images matters.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap, rankdata
from torch import Tensor

import dfqbench
from dfqbench.engine.device import autocast_of
from dfqbench.engine.evaluate import normalise
from dfqbench.network import Teacher
from dfqbench.run.agreement import agreement, kept_images
from dfqbench.run.options import StopFlag
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.config_file import text_digest
from dfqbench.sweep.load import LoadedSweep, load_sweep, span_sweep
from dfqbench.teachers import load
from dfqbench.yaml_file import read_yaml

HERE = Path(__file__).parent
SWEEP = HERE / "sweep.yaml"
CPU = torch.device("cpu")
GZNQ: dict[str, Any] = {"images": {"gznq": {"images": 64, "synthesis_batch": 64, "synthesis_iterations": 150}}, "count": 64}
ZEROQ = {"images": {"zeroq": {"images": 64, "synthesis_iterations": 200}}, "count": 64}
MAKERS = {  # as a sweep's `selection`; the first makes the images of `evaluate: none` (its confidence of 0 changes none here)
    "gznq": GZNQ,
    "gznq, seed 1001": {**GZNQ, "seed": 1001},
    "zeroq": ZEROQ,
    "zeroq, seed 1001": {**ZEROQ, "seed": 1001},
    "gdfq": {"images": {"gdfq": {"epochs": 4}}, "count": 256},
}


def image_sets(loaded: LoadedSweep, teacher: Teacher, folder: Path) -> dict[str, Tensor]:
    """Images by maker and number (N x 3 x 32 x 32)."""
    card, made = loaded.cells[0].teacher, {}
    for name, selection in MAKERS.items():
        spanned = span_sweep(read_yaml(SWEEP) | {"selection": selection}, SWEEP, text_digest(SWEEP), cache_folder()).selection
        assert spanned is not None
        path = folder / f"{spanned.digest(card)}.safetensors"
        made[name] = kept_images(path, spanned.maker(card), teacher, CPU, spanned.count, lambda line: print(line, flush=True), StopFlag())
    assert loaded.evaluation is not None
    pixels, _ = next(loaded.evaluation.decode(card.task).batches(10_000))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (card.task.mean, card.task.std))
    return {
        "gznq, 64": made["gznq"],
        "gznq, 64, seed 1001": made["gznq, seed 1001"],
        "gznq, 32": made["gznq"][:32],
        "gznq, 128": torch.cat([made["gznq"], made["gznq, seed 1001"]]),
        "zeroq, 64": made["zeroq"],
        "zeroq, 64, seed 1001": made["zeroq, seed 1001"],
        "gdfq, 256": made["gdfq"],
        "noise, 64": torch.randn(64, *card.task.image_shape, generator=torch.Generator().manual_seed(1000)),
        "real, 256": normalise(torch.from_numpy(np.ascontiguousarray(pixels[::39][:256])), mean, std),
    }


def scores(loaded: LoadedSweep, store: Path) -> pd.DataFrame:
    """A row per finished cell and set of images: `kl` in nats, `agreement` and `top1` in percent."""
    card = loaded.cells[0].teacher
    teacher = Teacher(load(loaded.teachers[card], card), card.task).to(memory_format=torch.channels_last)
    images = image_sets(loaded, teacher, store / "unseen")
    done = dfqbench.results(store).query("status == 'done'").set_index("id")
    rows = []
    for cell in [cell for cell in loaded.cells if cell.id in done.index]:
        student = dfqbench.load_student(cell.id, store).to(memory_format=torch.channels_last)
        for name, shown in images.items():
            found = agreement(student, teacher, shown, autocast_of(cell, CPU))
            rows.append({"id": cell.id, "method": cell.label, "bits": str(cell.bits), "top1": done.top1[cell.id], "images": name})
            rows[-1] |= {"kl": found.loss, "agreement": found.top1}
    return pd.DataFrame(rows)


def spearman(x: Any, y: Any, axis: int = -1) -> Any:
    """Spearman's rank correlation along an axis."""
    a, b = (ranks - ranks.mean(axis, keepdims=True) for ranks in (rankdata(x, axis=axis), rankdata(y, axis=axis)))
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def rho(a: Any, b: Any) -> str:
    """`spearman` with a 95 % interval over variants (percentile bootstrap)."""
    pair = a.to_numpy(float), b.to_numpy(float)
    low, high = bootstrap(pair, spearman, paired=True, method="percentile", n_resamples=2000, rng=0).confidence_interval
    return f"{spearman(*pair):.2f} ({low:.2f} to {high:.2f})"


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per width and set of images."""
    rows = []
    for (bits, name), group in frame.groupby(["bits", "images"], sort=False):
        rounding = group[group.method == "round"].iloc[0]
        foreign = group[~group.method.str.startswith(str(name).split(",")[0])]  # without the method that made the images
        others, better = group[group.method != "round"], group[group.top1 >= rounding.top1]
        sides = ((others.kl < rounding.kl) == (others.top1 > rounding.top1)).sum()
        rows.append(
            {
                "bits": bits,
                "images": name,
                "variants": len(group),
                "rho of -KL": rho(-group.kl, group.top1),
                "rho of -KL without the maker's method": rho(-foreign.kl, foreign.top1) + f", n = {len(foreign)}",
                "rho of agreement": f"{spearman(group.agreement, group.top1):.2f}",
                "rho of -KL, not below rounding": rho(-better.kl, better.top1) + f", n = {len(better)}",
                "right side of rounding": f"{sides} of {len(others)}",
                "top-1 of the lowest KL": f"{group.sort_values('kl').top1.iloc[0]:.2f}",
                "best top-1": f"{group.top1.max():.2f}",
            }
        )
    return pd.DataFrame(rows).sort_values("bits", ascending=False, kind="stable")


def markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = scores(load_sweep(SWEEP, cache_folder()), Path(sys.argv[1]))
    found.to_csv(HERE / "scores.csv", index=False, float_format="%.6g")
    (HERE / "correlation.md").write_text(markdown(correlations(found)))
    print(markdown(correlations(found)))
