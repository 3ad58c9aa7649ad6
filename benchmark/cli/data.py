"""dfqbench data: makes evaluation sets that studies were measured on from what is public."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make data sets of the reference results from what is public.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Make data sets of the reference results from what is public."""


@app.command("cifar10-jpeg")
def cifar10_jpeg(
    out: Annotated[Path, typer.Argument(readable=False, help="The folder to write; it must not exist yet.")],
    archive: Annotated[
        Path | None, typer.Option(readable=False, help="cifar-10-python.tar.gz; default: in DFQBENCH_DATA, downloaded where it is not there.")
    ] = None,
) -> None:
    """CIFAR-10 as JPEG files (quality 75, 4:2:0), the images of the studies: OUT/{train,test}/<class>/<index>.jpg."""
    from dfqbench.data.cifar_jpeg import cifar10_as_jpeg, download
    from dfqbench.errors import UserError

    if out.exists():
        raise UserError(f"{out} exists already: give the name of a new folder")
    made = cifar10_as_jpeg(out, archive or download(Path(os.environ.get("DFQBENCH_DATA") or "~/.cache/dfqbench").expanduser()))
    for split in made:
        equal = "equal to" if split.digest == split.expected else f"NOT equal to ({split.expected[:12]})"
        print(f"{split.folder}: {split.images} images, sha256 {split.digest[:12]}, {equal} the images of the studies in results/reference")
    if any(split.digest != split.expected for split in made):
        from PIL import __version__, features

        libjpeg = (
            f"libjpeg-turbo {features.version('libjpeg_turbo')}" if features.check_feature("libjpeg_turbo") else f"libjpeg {features.version('jpg')}"
        )
        print(f"accuracies on other images cannot be compared with the studies' (headers and tables are those of Pillow {__version__}, {libjpeg})")
    print(f"use them: export CIFAR10_JPEG={out}")
