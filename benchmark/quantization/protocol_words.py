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
WEIGHT_GRIDS = {
    "pow2": "{scale}, to the nearest of 0 and signed powers of two: 2^k - 1 levels at k bits, the scale itself a power of two",
    "apot": "{scale}, to the nearest of 0 and signed sums of powers of two (APoT): 2^k - 1 levels at k bits that reach to the largest weight",
    "kmeans": "with a codebook for each layer: 2^k codewords at k bits, found by k-means, which are floats",
    "ternary": "{scale}, to -a, 0 or a (TWN: 0 within 0.7 of the mean absolute weight): log2 3 bits, stored in 2",
}
GRADIENT = {"identity": "the identity everywhere", "clipped": "zero where a value was clipped to the range"}


def in_words(rules: dict[str, Any]) -> str:
    """Every rule of an identity's protocol in a sentence; an unknown rule is printed as it is."""
    known = {"placement", "input_bits", "first_bits", "last_bits", "weight_granularity", "weight_symmetric", "activation_symmetric"}
    known |= {"zero_in_range", "gradient", "ranges", "batch_norm", "weight_grid"}
    granularity = {"per-channel": "with one range per output channel", "per-tensor": "with one range per layer"}
    symmetric = "on a symmetric grid around 0" if rules.get("weight_symmetric") else "on an asymmetric grid"
    weights = f"{granularity.get(rules.get('weight_granularity', ''), '')}, {symmetric}"
    if rules.get("weight_grid", "uniform") != "uniform":
        scale = "with one scale per output channel" if rules.get("weight_granularity") == "per-channel" else "with one scale per layer"
        weights = WEIGHT_GRIDS.get(rules["weight_grid"], str(rules["weight_grid"])).format(scale=scale)
        uniform = [name for name in ("first", "last") if rules.get(f"{name}_bits") is not None]
        weights += f", but the {' and the '.join(uniform)} layer {symmetric}" if uniform else ""
    sentences = [
        f"Weights are quantized {weights}; the first layer has {_bits(rules.get('first_bits'))}, the last {_bits(rules.get('last_bits'))}.",
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
