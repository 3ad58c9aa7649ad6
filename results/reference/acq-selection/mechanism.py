"""What ACQ's settings for attention do to its generator, before any student: 300 steps of 32 images, seed 0, fp32. No real image is opened.

    python results/reference/acq-selection/mechanism.py [VARIANT ...]

CIFAR10_JPEG and CIFAR10_JPEG_TEACHER are set as for the config acq-student-selection. Appends a row per variant to mechanism.csv beside this file,
measured on 256 images of the generator as it is after its last step.
"""

import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dfqbench.network import Teacher
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.teachers import load
from dfqbench_methods.acq import ACQ
from dfqbench_methods.parts import attention as at
from dfqbench_methods.parts.losses import batch_norm_loss

HERE = Path(__file__).parent
SWEEP = HERE.parents[2] / "configs" / "acq-student-selection.yaml"
STEPS, BATCH = 300, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "acq": {},
    "cell": {"center_loss": "cell", "matching_weight": 0.5},
    "class": {"attention": "class"},
    "class, cell": {"attention": "class", "center_loss": "cell", "matching_weight": 0.5},
    "consistency alone": {"condition": False, "matching_weight": 0, "adversarial_weight": 0},
    "gdfq": {"condition": False, "matching_weight": 0, "adversarial_weight": 0, "consistency_weight": 0},
}


def measured(teacher: Teacher, settings: dict[str, Any]) -> dict[str, float | None]:
    """Trains a generator and measures its images; the correlations are None where no position is asked for."""
    config = ACQ.Config(epochs=4, iterations=100, batch_size=BATCH, warmup_epochs=4, **settings)
    method, start = ACQ(teacher, config, 0, "cpu"), time.process_time()
    method.setup()
    for _ in range(STEPS):
        method.synthesize()
    with torch.no_grad():
        batches = [method.generate() for _ in range(8)]
        distance = sum(method.distance_of_modes(images, teacher.observe(images)).item() for images, _, _ in batches) / len(batches)
        images, labels, asked = (torch.cat(parts) for parts in zip(*batches, strict=True))
        answer = teacher.observe(images)
        features = answer.features[-1]
        maps = {"energy": at.attention_map(features), "class": at.class_activation_map(features, at.classifier_weight(teacher), labels)}
        found = {name: at.center_of_mass(at.attention_mass(each, config.sharpness)) for name, each in maps.items()}
        return {
            "label_accuracy": 100 * (answer.logits.argmax(1) == labels).float().mean().item(),
            "bns": batch_norm_loss(teacher.observe(images[:64])).item(),
            "mode_distance": distance,
            **{f"correlation_{name}": at.correlation(each, asked).item() if config.condition else None for name, each in found.items()},
            **{f"spread_{name}": at.spread_within(each, labels, teacher.task.classes).item() for name, each in found.items()},
            "cpu_seconds": time.process_time() - start,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = load_sweep(SWEEP, cache_folder())
    card = loaded.cells[0].teacher
    teacher = Teacher(load(loaded.teachers[card], card), card.task).to(memory_format=torch.channels_last)
    table = HERE / "mechanism.csv"
    for name in sys.argv[1:] or VARIANTS:
        row = pd.DataFrame([{"variant": name, **measured(teacher, VARIANTS[name])}])
        row.to_csv(table, mode="a", header=not table.exists(), index=False, float_format="%.4f")
        print(row.to_string(index=False), flush=True)
