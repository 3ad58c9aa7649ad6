"""A protocol's rules as sentences. No torch here."""

from __future__ import annotations

from typing import Any

PLACEMENT = {
    "activations": "Activations are quantized behind every activation function; residual sums and pooled features stay float.",
    "layer-inputs": "Activations are quantized wherever they enter a convolution or a linear layer, and residual sums are quantized too.",
    "operands": "Activations are quantized wherever they enter a convolution, a linear layer or a matrix product, attention included.",
}
RANGES = {
    "ema": "a bias-corrected moving average of each batch's minimum and maximum, then frozen",
    "minmax": "the minimum and maximum over all calibration batches",
    "percentile": "percentiles of the calibration batches, so that outliers do not count",
    "mse": "the range with the least squared error on the calibration batches",
}
BATCH_NORM = {
    "fixed": "keeps the teacher's statistics and trains its affine parameters",
    "trained": "updates its statistics while training",
    "folded": "is folded into the layer before it",
}
GRADIENT = {"identity": "the identity everywhere", "clipped": "zero where a value was clipped to the range"}


def in_words(rules: dict[str, Any]) -> str:
    """Every rule of an identity's protocol in a sentence; an unknown rule is printed as it is."""
    known = {"placement", "input_bits", "first_bits", "last_bits", "weight_granularity", "weight_symmetric", "activation_symmetric"}
    known |= {"zero_in_range", "gradient", "ranges", "batch_norm"}
    granularity = {"per-channel": "with one range per output channel", "per-tensor": "with one range per layer"}
    symmetric = "on a symmetric grid around 0" if rules.get("weight_symmetric") else "on an asymmetric grid"
    sentences = [
        f"Weights are quantized {granularity.get(rules.get('weight_granularity', ''), '')}, {symmetric}; "
        f"the first layer has {_bits(rules.get('first_bits'))}, the last {_bits(rules.get('last_bits'))}.",
        PLACEMENT.get(rules.get("placement", ""), ""),
        f"The network's input {'stays float' if rules.get('input_bits') is None else 'has ' + _bits(rules['input_bits'])}.",
        f"Activation ranges come from {RANGES.get(rules.get('ranges', ''), rules.get('ranges'))}; "
        f"they {'always contain' if rules.get('zero_in_range') else 'need not contain'} zero"
        f"{' and are symmetric' if rules.get('activation_symmetric') else ''}; evaluation never moves them.",
        f"The straight-through gradient is {GRADIENT.get(rules.get('gradient', ''), rules.get('gradient'))}.",
        f"Batch norm {BATCH_NORM.get(rules.get('batch_norm', ''), rules.get('batch_norm'))}.",
        *(f"{key}: {value}." for key, value in rules.items() if key not in known),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _bits(bits: int | None) -> str:
    return "as many bits as all others" if bits is None else f"{bits} bits"
