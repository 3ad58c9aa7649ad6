"""Builds a teacher's network, gives it its weights, and finds out what it expects of an image."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmark.errors import UserError, nearest
from benchmark.task import Task
from benchmark.teachers import UNTRAINED, ZOOS, TeacherSpec
from benchmark.teachers.cifar import BLOCKS_PER_STAGE, cifar_resnet
from benchmark.teachers.weights import fit_weights, one_line, read_weights

T = TypeVar("T")  # python 3.11 has no other way to say it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# pytorchcv normalises the images of all its 32-pixel networks (CIFAR-10, CIFAR-100, SVHN) so: CIFAR10MetaInfo in its training code.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# What pytorchcv's provider offers beside image classifiers.
NOT_CLASSIFIERS = re.compile(
    r"_(voc|coco|ade20k|cityscapes|celebamaskhq)$|^(jasper|quartznet|raft|propainter|prnet|pfpcnet|lffd|voca|nvpattexp|visemenet|superpointnet)"
)


@dataclass(frozen=True)
class Built:
    """A network with its weights, and the task that it was trained for."""

    network: nn.Module
    task: Task


def build(spec: TeacherSpec) -> Built:
    """The network in float32, eval mode, without gradients; torch's global random stream is left as it was."""
    place, name = spec.source
    with torch.random.fork_rng(devices=[]):
        built = BUILDERS[place](name, spec) if place in ZOOS else _from_file(name, spec)
    network = built.network.float().eval().requires_grad_(False)
    return Built(network, _with_overrides(built.task, spec))


def check_answer(built: Built, spec: TeacherSpec) -> None:
    """UserError unless the network answers one grey image with one finite logit per class."""
    where, task = f"teacher {spec.model!r}", built.task
    try:
        with torch.inference_mode():
            answer = built.network(torch.zeros(1, *task.image_shape))
    except Exception as error:
        raise UserError(f"{where} cannot take an image of {' x '.join(map(str, task.image_shape))}: {one_line(error)}") from error
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if shape != (1, task.classes):
        raise UserError(f"{where} answers one image with {shape}, not with (1, {task.classes}) logits")
    if not bool(torch.isfinite(answer).all()):
        raise UserError(f"{where} answers a grey image with logits that are not finite")


def zoo_names(zoo: str) -> list[str]:
    """Every name that a zoo knows, sorted; UserError where its package is not installed."""
    if zoo == "cifar":
        return list(BLOCKS_PER_STAGE)
    package = _package(zoo)
    if zoo == "torchvision":
        return sorted(package.models.list_models(module=package.models))
    if zoo == "timm":
        return sorted({*package.list_models(), *package.list_models(pretrained=True)})
    return sorted(name for name in package.model_provider._models if not NOT_CLASSIFIERS.search(name))


def _torchvision(name: str, spec: TeacherSpec) -> Built:
    """Weights are IMAGENET1K_V1, with which the literature's full-precision numbers were measured (ResNet-18: 69.76 %), not torchvision's newest."""
    _known(name, "torchvision")
    models = _package("torchvision").models
    known = [entry for entry in models.get_model_weights(name) if entry.name == "IMAGENET1K_V1"]
    if not known and (spec.weights is None or spec.size is None):
        raise UserError(f"{spec.model}: torchvision has no IMAGENET1K_V1 weights for it; give `weights: FILE` and `size`")
    state = _state(spec, lambda: known[0].get_state_dict(progress=False, check_hash=True, weights_only=True))
    options: dict[str, Any] = {} if spec.classes is None else {"num_classes": spec.classes}
    if name.startswith("densenet"):  # torchvision's own files still have the names of 2017, and its builder renames them
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): value for key, value in state.items()}
    if name in ("inception_v3", "googlenet"):
        # As torchvision builds them for its own weights, which come from TensorFlow and expect another normalisation.
        options |= {"transform_input": True, "init_weights": False, "aux_logits": any(key.lower().startswith("aux") for key in state)}
    network = models.get_model(name, weights=None, **options)
    _fit(network, state, spec)
    if name in ("inception_v3", "googlenet"):  # the heads that only training uses
        network.aux_logits = False
        for head in ("AuxLogits", "aux1", "aux2"):
            if hasattr(network, head):
                setattr(network, head, None)
    classes = spec.classes or 1000
    if not known:
        return Built(network, Task(classes, 3, spec.size or 0, IMAGENET_MEAN, IMAGENET_STD, crop_ratio=0.875))
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
        network = _download(spec, lambda: timm.create_model(name, pretrained=True))
    else:
        network = timm.create_model(name, pretrained=False, **({} if spec.classes is None else {"num_classes": spec.classes}))
        _fit(network, _state(spec), spec)
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

    _fit(network, _state(spec, download), spec)
    if size == 32:
        return Built(network, Task(classes, 3, size, CIFAR_MEAN, CIFAR_STD))
    # Its evaluation resizes the shorter side to ceil(size / 0.875).
    return Built(network, Task(classes, 3, size, IMAGENET_MEAN, IMAGENET_STD, crop_ratio=size / math.ceil(size / 0.875)))


def _cifar(name: str, spec: TeacherSpec) -> Built:
    """Classes and input channels are read off the weights. A one-channel network gets the mean of ImageNet's three means and deviations."""
    _known(name, "cifar")
    if spec.weights is None:
        raise UserError(f"{spec.model}: no zoo has weights for it; train it with `dfqbench pretrain`, then give `weights: FILE`")
    state = _state(spec)
    conv1, linear = state.get("conv1.weight"), state.get("linear.weight")
    channels = conv1.shape[1] if conv1 is not None and conv1.ndim == 4 else 3
    classes = spec.classes or (linear.shape[0] if linear is not None and linear.ndim == 2 else 10)
    network = cifar_resnet(name, classes, channels)
    _fit(network, state, spec)
    return Built(network, cifar_task(classes, channels))


def cifar_task(classes: int, channels: int) -> Task:
    """What the `cifar:` networks expect: 32 x 32 pixels, not cropped, normalised as ImageNet is; grey ones with the mean of the three channels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    if channels != 3:
        mean, std = (round(sum(mean) / 3, 6),) * channels, (round(sum(std) / 3, 6),) * channels
    return Task(classes, channels, 32, mean, std)


BUILDERS: dict[str, Callable[[str, TeacherSpec], Built]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "pytorchcv": _pytorchcv,
    "cifar": _cifar,
}


def _from_file(name: str, spec: TeacherSpec) -> Built:
    """Calls a factory in a user's file or module. What the network expects stands in the config, or in its attributes of the same names."""
    where = f"teacher {spec.model!r}"
    module = _import_file(spec)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UserError(f"{where}: {spec.source_module or spec.source_file} has no factory {name!r}: {nearest(name, _own(module))}")
    try:
        network = factory()
    except Exception as error:
        raise UserError(f"{where}: the factory failed: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{where}: the factory returns {type(network).__name__}, not a torch.nn.Module")
    if spec.weights is not None:
        _fit(network, _state(spec), spec)
    known: dict[str, Any] = {}
    for key in ("classes", "size", "mean", "std"):
        given = getattr(spec, key)
        known[key] = given if given is not None else getattr(network, key, None)
    missing = [key for key, value in known.items() if value is None]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing: give them in the config, or as attributes of the network")
    try:
        mean, std = (tuple(float(value) for value in known[key]) for key in ("mean", "std"))
        task = Task(int(known["classes"]), len(mean), int(known["size"]), mean, std)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: classes and size must be whole numbers, mean and std one number per channel ({error})") from None
    if len(mean) != len(std) or min(std, default=0) <= 0:
        raise UserError(f"{where}: mean {mean} and std {std} must have a number per channel each, and std must be above 0")
    return Built(network, task)


def factory_names(spec: TeacherSpec) -> list[str]:
    """What a user's file or module defines and could be a factory: its functions and network classes, sorted."""
    return sorted(name for name in _own(_import_file(spec)) if not name.startswith("_"))


def _own(module: ModuleType) -> list[str]:
    own = {key: value for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", None) == module.__name__}
    return [key for key, value in own.items() if not isinstance(value, type) or issubclass(value, nn.Module)]


def _import_file(spec: TeacherSpec) -> ModuleType:
    if spec.source_module is not None:
        try:
            return importlib.import_module(spec.source_module)
        except Exception as error:
            raise UserError(f"teacher {spec.model!r}: importing {spec.source_module} failed: {one_line(error)}") from error
    path = spec.source_file
    assert path is not None
    qualified = f"dfqbench_teacher_{path.stem}"
    found = importlib.util.spec_from_file_location(qualified, path)
    assert found is not None  # true of every path that ends with .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # a network's file may import its neighbours
    sys.modules[qualified] = module  # dataclasses and pickles look a class's module up by name
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"teacher {spec.model!r}: importing {path} failed: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _state(spec: TeacherSpec, download: Callable[[], Mapping[str, Tensor]] | None = None) -> Mapping[str, Tensor]:
    """The weights from the file that the spec names, else from the zoo; none where the network is to stay untrained."""
    if spec.weights == UNTRAINED:
        return {}
    if spec.weights_file is not None:
        return read_weights(spec.weights_file)
    assert download is not None
    return _download(spec, download)


def _download(spec: TeacherSpec, download: Callable[[], T]) -> T:
    try:
        return download()
    except Exception as error:  # every hub fails in its own way: URLError, requests' and httpx' errors, a wrong hash as RuntimeError or ValueError
        raise UserError(f"{spec.model}: the zoo's weights could not be had ({one_line(error)}); give `weights: FILE`") from error


def _fit(network: nn.Module, state: Mapping[str, Tensor], spec: TeacherSpec) -> None:
    if spec.weights == UNTRAINED:
        return
    try:
        fit_weights(network, state, f"{spec.model}: {spec.weights or 'the zoo weights'}")
    except UserError as error:
        hint = "; `classes: N` builds the network for N classes" if spec.classes is None and "other shape" in str(error) else ""
        raise UserError(f"{error}{hint}") from None


def _with_overrides(task: Task, spec: TeacherSpec) -> Task:
    """The spec's settings win over what a zoo says; UserError where they do not go with the network's channels."""
    changes = {key: value for key in ("classes", "size", "mean", "std", "crop_ratio", "interpolation") if (value := getattr(spec, key)) is not None}
    for key in ("mean", "std"):
        if key in changes and len(changes[key]) != task.channels:
            raise UserError(f"teacher {spec.model!r}: {key} has {len(changes[key])} values, the network takes {task.channels} channels")
    return replace(task, **changes)


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
