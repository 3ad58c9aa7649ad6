"""The quantization rules that every number carries, as one frozen value: what is quantized, on which grid, with how many bits."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dfqbench.errors import UserError, UserErrors, nearest
from dfqbench.yaml_file import read_yaml

RangeEstimatorName = Literal["ema", "minmax", "percentile", "mse"]
Placement = Literal["activations", "layer-inputs", "operands"]
BatchNormMode = Literal["fixed", "trained", "folded"]
WeightGridName = Literal["uniform", "pow2", "apot", "kmeans", "ternary"]

GRID_WIDTHS: dict[WeightGridName, tuple[int, int]] = {"uniform": (2, 8), "pow2": (2, 6), "apot": (2, 5), "kmeans": (2, 8), "ternary": (2, 2)}
ONE_CODEBOOK = "weight_grid 'kmeans' has one codebook for all of a weight: write `weight_granularity: per-tensor` beside it"


class Bits(NamedTuple):
    """Bit widths of one student: `w4a3` has 4-bit weights and 3-bit activations.

    weights: of a student whose tensors have a width each, their average, which need not be whole: `w3.5a4`.
    """

    weights: float
    activations: int

    @classmethod
    def parse(cls, text: object, average: bool = False) -> Bits:
        """Raises UserError for anything but w<2-8>a<2-8>; `average`: weights may have decimals, as they have in a finished cell's record."""
        match = re.fullmatch(r"w([2-8](?:\.\d+)?)a([2-8])" if average else r"w([2-8])a([2-8])", str(text))
        if match is None:
            means = "" if average or not re.fullmatch(r"w\d\.\d+a\d", str(text)) else "; an average of weight bits needs an allocator (`allocate`)"
            raise UserError(f"{text!r} is not a bit width: write weights and activations, 2 to 8 each, like 'w4a4'{means}")
        return cls(float(match[1]) if "." in match[1] else int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weights:g}a{self.activations}"


class Protocol(BaseModel):
    """How a network is quantized. Two numbers can be compared only under equal protocols.

    Three are built in. `lineage` is what GDFQ's public code does and what its successors copied. `hardware` can be run by
    integer kernels: whatever enters a convolution or a linear layer, and every residual sum, lies on a grid. `full` is for networks that
    `lineage` was not made for: every operand of every convolution, linear layer and matrix product lies on a grid, attention included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="custom", description="what tables call it; not part of what is hashed")
    placement: Placement = Field(
        default="activations",
        description="where activations are quantized: after every activation function; "
        "whatever enters a convolution or linear layer, and every residual sum; or every operand of convolutions, linear layers and matrix products",
    )
    input_bits: int | None = Field(default=None, ge=2, le=8, description="bits of the network's input image; null leaves it float")
    first_bits: int | None = Field(default=None, ge=2, le=8, description="weight bits of the first layer; null: as all others")
    last_bits: int | None = Field(
        default=None, ge=2, le=8, description="weight (and, where what enters layers is quantized, input) bits of the last layer; null: as all others"
    )
    weight_granularity: Literal["per-channel", "per-tensor"] = Field(
        default="per-channel", description="one grid for each output channel of a weight, or one for all of it"
    )
    weight_symmetric: bool = Field(default=False, description="weights on -(2^(k-1)-1)..2^(k-1)-1 with zero point 0")
    weight_grid: WeightGridName = Field(
        default="uniform",
        exclude_if=lambda kind: kind == "uniform",  # so that protocols are hashed and written as before there was another
        description="levels of weights: even steps, signed powers of two, sums of powers of two, a codebook by k-means, or -a, 0, a; "
        "layers whose bits `first_bits` or `last_bits` say keep even steps",
    )
    activation_symmetric: bool = Field(default=False, description="activations on a grid around zero, as symmetric weights are")
    zero_in_range: bool = Field(default=False, description="activation ranges are widened to contain zero, so that padding is exact")
    gradient: Literal["identity", "clipped"] = Field(
        default="identity", description="straight-through gradient: identity everywhere, or zero where a value was clipped to the range"
    )
    ranges: RangeEstimatorName = Field(default="ema", description="how activation ranges are estimated, unless the method declares another way")
    batch_norm: BatchNormMode = Field(
        default="fixed",
        description="BN of a student in training: fixed statistics and trained affine, trained statistics, or folded into the layer before",
    )

    def fingerprint(self) -> dict[str, Any]:
        """Everything that can change a number; the name cannot."""
        return self.model_dump(exclude={"name"})

    @property
    def of_pinned(self) -> Protocol:
        """Of layers whose bits the protocol says: they keep even steps."""
        return self if self.weight_grid == "uniform" else self.model_copy(update={"weight_grid": "uniform"})

    def check_bits(self, bits: Bits, allocated: bool = False) -> None:
        """UserError where the weight grid does not have this width; allocated: each tensor may have any width."""
        least, most = GRID_WIDTHS[self.weight_grid]
        if allocated and (least, most) != GRID_WIDTHS["uniform"]:
            raise UserError(
                f"{bits}: bits are allocated from 2 to 8, weight_grid {self.weight_grid!r} has {_span(least, most)}: use uniform or kmeans"
            )
        if not least <= bits.weights <= most:
            other = " or ".join(kind for kind, (low, high) in GRID_WIDTHS.items() if low <= bits.weights <= high)
            raise UserError(f"{bits}: weight_grid {self.weight_grid!r} has {_span(least, most)} bits for weights, not {bits.weights:g}: use {other}")
        if self.weight_grid == "kmeans" and self.weight_granularity != "per-tensor":
            raise UserError(ONE_CODEBOOK)

    def check_grid(self, method: str, grids: Collection[WeightGridName]) -> None:
        """UserError where the method does not work with this weight grid."""
        if self.weight_grid not in grids:
            raise UserError(f"method {method}, as it is set, does not work with weight_grid {self.weight_grid!r}: take {' or '.join(grids)}")

    def for_method(self, method: str, ranges: RangeEstimatorName | None, batch_norm: BatchNormMode | None) -> Protocol:
        """This protocol with what the method declares for itself; UserError where the two cannot work together."""
        if batch_norm is not None and batch_norm != self.batch_norm and "folded" in (batch_norm, self.batch_norm):
            raise UserError(
                f"method {method} needs batch norm '{batch_norm}', protocol {self.name} has it '{self.batch_norm}': "
                "take another protocol for this method, or another method"
            )
        return self.model_copy(update={k: v for k, v in {"ranges": ranges, "batch_norm": batch_norm}.items() if v is not None})


def _span(least: int, most: int) -> str:
    return f"{least} to {most}" if most > least else f"{least}"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="lineage"),
        Protocol(
            name="hardware",
            placement="layer-inputs",
            input_bits=8,
            first_bits=8,
            last_bits=8,
            weight_symmetric=True,
            zero_in_range=True,
            gradient="clipped",
            batch_norm="folded",
        ),
        Protocol(name="full", placement="operands", input_bits=8, zero_in_range=True, gradient="clipped"),
    )
}


def find_protocol(given: str | dict[str, Any]) -> Protocol:
    """A built-in protocol by name, a YAML file with a mapping, or a mapping: it starts from a protocol, `{base: lineage, first_bits: 8}`.

    Raises UserErrors with all that is wrong.
    """
    if isinstance(given, str):
        if given in PROTOCOLS:
            return PROTOCOLS[given]
        if Path(given).suffix in (".yaml", ".yml"):
            return _from_file(Path(given).expanduser())
        raise UserError(f"unknown protocol {given!r}: {nearest(given, PROTOCOLS)}; a file is written path/to/protocol.yaml")
    if not isinstance(given, dict):
        raise UserError(f"a protocol is a name or a mapping, not {given!r}: {nearest('', PROTOCOLS)}")
    changes = dict(given)
    base = find_protocol(str(changes.pop("base", "lineage")))
    unknown = [key for key in changes if key not in Protocol.model_fields]
    problems = [f"unknown protocol setting {key!r}: {nearest(key, [*Protocol.model_fields, 'base'])}" for key in unknown]
    changes = {key: value for key, value in changes.items() if key not in unknown}
    name = changes.pop("name", None)
    try:
        protocol = Protocol(**{**base.model_dump(), **changes, "name": name or base.name})
        if not name:
            described = [f"{key}={getattr(protocol, key)}" for key in sorted(changes)]
            protocol = protocol.model_copy(update={"name": "+".join([base.name, *described])})
        if protocol.weight_grid == "kmeans" and protocol.weight_granularity != "per-tensor":
            problems.append(ONE_CODEBOOK)
    except ValidationError as error:
        problems += [f"protocol.{e['loc'][0]}: {e['input']!r}: {e['msg']}" for e in error.errors()]
    if problems:
        raise UserErrors(problems)
    return protocol


def _from_file(path: Path) -> Protocol:
    """A file's protocol; it is called as the file is, unless it has a `name`."""
    content = read_yaml(path, "protocol")
    if not isinstance(content, dict):
        raise UserError(f"protocol {path}: a mapping is expected, like 'base: lineage' and 'first_bits: 8', a line each")
    if Path(str(content.get("base", ""))).suffix in (".yaml", ".yml"):
        raise UserError(f"protocol {path}: base {content['base']!r}: {nearest(content['base'], PROTOCOLS)}")
    try:
        protocol = find_protocol({"name": path.stem, **content})
    except UserErrors as errors:
        raise UserErrors(f"{path}: {message}" for message in errors.messages) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if protocol != PROTOCOLS.get(protocol.name, protocol):  # a table must not take one for the other
        raise UserError(f"{path}: a built-in protocol with other rules is called {protocol.name!r}: give this one another `name`")
    return protocol
