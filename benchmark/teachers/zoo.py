"""Networks of the zoos: built, given their weights, and what they expect of an image."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

from dfqbench.errors import UserError, nearest
from dfqbench.task import Kind, Task
from dfqbench.teachers import scenes
from dfqbench.teachers.cifar import NETWORKS, cifar_resnet
from dfqbench.teachers.spec import TWO_STAGE, Built, TeacherSpec, zoo_kind
from dfqbench.teachers.torchvision_dense import dense_names, detector, segmentation
from dfqbench.teachers.weights import downloaded, fit, read_weights, weights_of

T = TypeVar("T")  # python 3.11 has no other way to say it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# pytorchcv normalises the images of all its 32-pixel networks (CIFAR-10, CIFAR-100, SVHN) so: CIFAR10MetaInfo in its training code.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# What pytorchcv's provider offers beside image classifiers.
NOT_CLASSIFIERS = re.compile(
    r"_(voc|coco|ade20k|cityscapes|celebamaskhq)$|^(jasper|quartznet|raft|propainter|prnet|pfpcnet|lffd|voca|nvpattexp|visemenet|superpointnet)"
)


def zoo_names(zoo: str) -> list[str]:
    """Every name that a zoo knows, sorted; UserError where its package is not installed."""
    if zoo == "cifar":
        return list(NETWORKS)
    if zoo == "scenes":
        return list(scenes.NETWORKS)
    package = _package(zoo)
    if zoo == "torchvision":
        return sorted([*package.models.list_models(module=package.models), *dense_names(package.models)])
    if zoo == "timm":
        return sorted({*package.list_models(), *package.list_models(pretrained=True)})
    return sorted(name for name in package.model_provider._models if not NOT_CLASSIFIERS.search(name))


def _torchvision(name: str, spec: TeacherSpec) -> Built:
    """Weights are IMAGENET1K_V1, with which the literature's full-precision numbers were measured (ResNet-18: 69.76 %), not torchvision's newest."""
    models = _package("torchvision").models
    if name.startswith(TWO_STAGE):
        raise UserError(
            f"{spec.model}: its second stage looks at boxes that its first found, so that it has no answer to compare or quantize as a "
            "whole: take a one-stage detector, like torchvision:retinanet_resnet50_fpn or torchvision:ssdlite320_mobilenet_v3_large"
        )
    _known(name, "torchvision")
    kind = zoo_kind(spec.model)
    if kind != "classify":
        return (segmentation if kind == "segment" else detector)(models, name, spec)
    known = [entry for entry in models.get_model_weights(name) if entry.name == "IMAGENET1K_V1"]
    if not known and (spec.weights is None or spec.size is None):
        raise UserError(f"{spec.model}: torchvision has no IMAGENET1K_V1 weights for it; give `weights: FILE` and `size`")
    state = weights_of(spec, lambda: known[0].get_state_dict(progress=False, check_hash=True, weights_only=True))
    options: dict[str, Any] = {} if spec.classes is None else {"num_classes": spec.classes}
    if name.startswith("densenet"):  # torchvision's own files still have the names of 2017, and its builder renames them
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): value for key, value in state.items()}
    if name in ("inception_v3", "googlenet"):
        # As torchvision builds them for its own weights, which come from TensorFlow and expect another normalisation.
        options |= {"transform_input": True, "init_weights": False, "aux_logits": any(key.lower().startswith("aux") for key in state)}
    network = models.get_model(name, weights=None, **options)
    fit(network, state, spec)
    if name in ("inception_v3", "googlenet"):  # the heads that only training uses
        network.aux_logits = False
        for head in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, head):
                setattr(network, head, None)
    classes = spec.classes or 1000
    if not known:
        return Built(network, Task(classes, 3, (spec.height_and_width or (0, 0))[0], IMAGENET_MEAN, IMAGENET_STD, crop_ratio=0.875))
    wants = known[0].transforms()
    size, resized = wants.crop_size[0], wants.resize_size[0]
    task = Task(classes, 3, size, tuple(wants.mean), tuple(wants.std), crop_ratio=size / resized, interpolation=wants.interpolation.value)
    return Built(network, task)


def _timm(name: str, spec: TeacherSpec) -> Built:
    timm = _package("timm")
    if not timm.is_model(name) or ("." in name and not timm.is_model_pretrained(name)):
        _known(name, "timm")
    config = timm.get_pretrained_cfg(name)
    if spec.weights is None:
        if not timm.is_model_pretrained(name):
            raise UserError(f"{spec.model}: timm has no weights for it; give `weights: FILE`")
        if spec.classes not in (None, config.num_classes):
            raise UserError(f"{spec.model}: timm's weights have {config.num_classes} classes, not {spec.classes}; give `weights: FILE`")
        network = downloaded(spec, lambda: timm.create_model(name, pretrained=True))
    else:
        network = timm.create_model(name, pretrained=False, **({} if spec.classes is None else {"num_classes": spec.classes}))
        fit(network, weights_of(spec), spec)
    channels, height, width = config.input_size
    if height != width and spec.size is None:
        raise UserError(f"{spec.model} takes images of {height} x {width}; only square ones are evaluated here: give `size`")
    if config.crop_mode != "center" and spec.crop_ratio is None:
        raise UserError(f"{spec.model}: timm prepares images by {config.crop_mode!r}, here the centre is cropped: accept it by giving `crop_ratio`")
    task = Task(network.num_classes, channels, height, tuple(config.mean), tuple(config.std), config.crop_pct, config.interpolation)
    return Built(network, task)


def _pytorchcv(name: str, spec: TeacherSpec) -> Built:
    _known(name, "pytorchcv")
    provider = _package("pytorchcv").model_provider
    try:
        network = provider.get_model(name, **({} if spec.classes is None else {"num_classes": spec.classes}))
    except AssertionError:
        raise UserError(f"{spec.model}: pytorchcv cannot build it with {spec.classes} classes") from None
    try:
        (size, width), classes = network.in_size, network.num_classes
    except AttributeError:
        raise UserError(f"{spec.model} is not an image classifier") from None
    if size != width and spec.size is None:
        raise UserError(f"{spec.model} takes images of {size} x {width}; only square ones are evaluated here: give `size`")

    def download() -> Mapping[str, Tensor]:
        # Not get_model(pretrained=True): that unpickles the file without restriction.
        store = importlib.import_module("pytorchcv.models.common.model_store")
        with contextlib.redirect_stdout(sys.stderr):  # it prints its attempts, and output may be a table
            path = store.get_model_file(name)
        own = network.state_dict()
        return {key: value for key, value in read_weights(path).items() if key in own}  # as its load_model does

    fit(network, weights_of(spec, download), spec)
    if size == 32:
        return Built(network, Task(classes, 3, size, CIFAR_MEAN, CIFAR_STD))
    # Its evaluation resizes the shorter side to ceil(size / 0.875).
    return Built(network, Task(classes, 3, size, IMAGENET_MEAN, IMAGENET_STD, crop_ratio=size / math.ceil(size / 0.875)))


def _cifar(name: str, spec: TeacherSpec) -> Built:
    """Classes and input channels are read off the weights. A one-channel network gets the mean of ImageNet's three means and deviations."""
    _known(name, "cifar")
    if spec.weights is None:
        raise UserError(f"{spec.model}: no zoo has weights for it; train it with `dfqbench pretrain`, then give `weights: FILE`")
    state = weights_of(spec)
    conv1, linear = state.get("conv1.weight"), state.get("linear.weight")
    channels = conv1.shape[1] if conv1 is not None and conv1.ndim == 4 else 3
    classes = spec.classes or (linear.shape[0] if linear is not None and linear.ndim == 2 else 10)
    network = cifar_resnet(name, classes, channels)
    fit(network, state, spec)
    return Built(network, replace(cifar_task(classes, channels), exits=getattr(network, "exits", 1)))


def cifar_task(classes: int, channels: int) -> Task:
    """What the `cifar:` networks expect: 32 x 32 pixels, not cropped, normalised as ImageNet is; grey ones with the mean of the three channels."""
    mean, std = _normalisation(channels)
    return Task(classes, channels, 32, mean, std)


def _scenes(name: str, spec: TeacherSpec) -> Built:
    """Classes and input channels are read off the weights, and are those of scenes of digits where there are none."""
    _known(name, "scenes")
    if spec.weights is None:
        raise UserError(f"{spec.model}: no zoo has weights for it; train it with `dfqbench pretrain digit-scenes-{name}`, then give `weights: FILE`")
    state, factory = weights_of(spec), scenes.NETWORKS[name]
    stem, last = (next((v for k, v in state.items() if k in keys and v.ndim == 4), None) for keys in scenes.ENDS)
    channels = stem.shape[1] if stem is not None else 1
    network = factory(spec.classes or (last.shape[0] if last is not None else scenes.CLASSES[name]), channels)
    fit(network, state, spec)
    return Built(network, scenes_task(name, network.classes, channels))


def scenes_task(name: str, classes: int, channels: int) -> Task:
    """What the `scenes:` networks expect: 64 x 64 pixels, normalised as the `cifar:` networks' are."""
    kind: Kind = "segment" if name == "segment" else "detect"
    return Task(classes, channels, 64, *_normalisation(channels), kind=kind)


def _normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of ImageNet; of other than three channels, the mean of the three."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    if channels != 3:
        mean, std = (round(sum(mean) / 3, 6),) * channels, (round(sum(std) / 3, 6),) * channels
    return mean, std


def _known(name: str, zoo: str) -> None:
    names = zoo_names(zoo)
    if name not in names:
        raise UserError(f"teacher '{zoo}:{name}': {zoo} has no network {name!r}: {nearest(name, names)}")


def _package(zoo: str) -> ModuleType:
    try:
        if zoo == "pytorchcv":
            importlib.import_module("pytorchcv.model_provider")
        return importlib.import_module(zoo)
    except ImportError as error:
        raise UserError(f"the zoo {zoo!r} needs a package that cannot be imported: pip install {zoo} ({error})") from None


BUILDERS: dict[str, Callable[[str, TeacherSpec], Built]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "pytorchcv": _pytorchcv,
    "cifar": _cifar,
    "scenes": _scenes,
}
