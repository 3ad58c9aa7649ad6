"""Weight files: read without running anything that they contain, and fitted to a network without leaving anything out."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.teachers.baking import baked
from dfqbench.teachers.spec import UNTRAINED, TeacherSpec

T = TypeVar("T")  # python 3.11 has no other way to say it
NAMES_OF_WRAPPERS = ("module.", "_orig_mod.")  # nn.DataParallel and DistributedDataParallel; torch.compile
WRAPPERS = ("state_dict", "model")  # what training scripts call the weights in a checkpoint that holds more


def weights_of(spec: TeacherSpec, download: Callable[[], Mapping[str, Tensor]] | None = None) -> Mapping[str, Tensor]:
    """The weights from the file that the spec names, else from the zoo; none where the network is to stay untrained."""
    if spec.weights == UNTRAINED:
        return {}
    if spec.weights_file is not None:
        return read_weights(spec.weights_file)
    assert download is not None
    return downloaded(spec, download)


def downloaded(spec: TeacherSpec, download: Callable[[], T]) -> T:
    try:
        return download()
    except Exception as error:  # every hub fails in its own way: URLError, requests' and httpx' errors, a wrong hash as RuntimeError or ValueError
        raise UserError(f"{spec.model}: the zoo's weights could not be had ({one_line(error)}); give `weights: FILE`") from error


def fit(network: nn.Module, state: Mapping[str, Tensor], spec: TeacherSpec) -> None:
    if spec.weights == UNTRAINED:
        return
    try:
        fit_weights(network, state, f"{spec.model}: {spec.weights or 'the zoo weights'}")
    except UserError as error:
        hint = "; `classes: N` builds the network for N classes" if spec.classes is None and "other shape" in str(error) else ""
        raise UserError(f"{error}{hint}") from None


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over (name, dtype, shape, bytes), sorted by name; memory layout and device do not enter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name. Nothing in the file is executed; UserError where it cannot be read so."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _without_wrappers(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: no readable safetensors file, truncated or damaged? ({one_line(error)})") from error
    try:
        with warnings.catch_warnings():  # torch's advice on how to load the file anyway
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL `?([\w.]+)", str(error))
        what = f"it asks to run {asked[1]!r} when it is loaded" if asked else f"it is damaged, or more than plain weights ({_unpickler_says(error)})"
        raise UserError(f"{path}: refused: {what}; a state_dict alone can be loaded safely") from error
    except Exception as error:  # torch reports a damaged archive by RuntimeError, EOFError, OSError, KeyError, ... depending on where it is cut
        raise UserError(f"{path}: no readable weights file, truncated or damaged? ({one_line(error)})") from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds {type(content).__name__}, not a state_dict (a mapping from names to tensors)")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            wrapped = " or ".join(map(repr, WRAPPERS))
            raise UserError(f"{path}: entry {name!r} is {type(value).__name__}, not a tensor (a state_dict may lie under {wrapped})")
    state: OrderedDict[str, Tensor] = OrderedDict(content)
    if hasattr(content, "_metadata"):  # layer versions, by which some networks read their older files
        state._metadata = content._metadata  # type: ignore[attr-defined]
    return _without_wrappers(state)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what nn.DataParallel and torch.compile put before all of them (`module.`, `_orig_mod.`), in any order and number."""
    while state and any(all(name.startswith(wrapper) for name in state) for wrapper in NAMES_OF_WRAPPERS):
        state = OrderedDict((name.partition(".")[2], value) for name, value in state.items())
    return state


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if f"{part}." not in NAMES_OF_WRAPPERS)


def _named_as(own: Mapping[str, object], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` with the network's names, where the two differ by wrappers of the network or of parts of it."""
    names = {_bare(name): name for name in own}
    if set(state) <= set(own) or len(names) < len(own) or len({_bare(name) for name in state}) < len(state):
        return state
    return OrderedDict((names.get(_bare(name), name), value) for name, value in state.items())


def fit_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `network`; UserError that names the first few entries where the two do not fit.

    One kind of entry may be missing: `num_batches_tracked`, the counter of batch norm, which no output in eval mode depends on.
    """
    own = network.state_dict()
    if not set(state) <= set(own):
        metadata = getattr(state, "_metadata", None)
        state = OrderedDict(baked(_named_as(own, state), network))
        state._metadata = own._metadata if metadata is None else metadata  # type: ignore[attr-defined]
    wrong_shape = [
        f"{name} {tuple(state[name].shape)} where the network has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong_kind = [
        f"{name} {state[name].dtype} where the network has {own[name].dtype}"
        for name in own
        if name in state and state[name].is_floating_point() != own[name].is_floating_point()
    ]
    not_finite = [name for name, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    missing: list[str] = []
    unexpected: list[str] = []
    if not (wrong_shape or wrong_kind):
        filled = OrderedDict(state)
        filled._metadata = getattr(state, "_metadata", own._metadata)  # type: ignore[attr-defined]
        answer = network.load_state_dict(filled, strict=False)
        missing = [name for name in answer.missing_keys if not name.endswith("num_batches_tracked")]
        unexpected = list(answer.unexpected_keys)
    else:  # a network cannot be asked what is missing where shapes differ; names are compared instead
        missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
        unexpected = [name for name in state if name not in own]
    problems = [
        f"{label} {_some(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("other shape:", wrong_shape),
            ("other kind:", wrong_kind),
            ("not finite:", not_finite),
        )
        if names
    ]
    if problems:
        raise UserError(f"{source} does not fit the network: " + "; ".join(problems))


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _unpickler_says(error: BaseException) -> str:
    """The reason alone, out of a page of advice."""
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return reason[1].strip() if reason else one_line(error)


def one_line(error: BaseException, most: int = 200) -> str:
    """The first line of what went wrong, with the kind of error before it; the messages of torch and of the hubs are whole pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:most]}" if lines else type(error).__name__
