"""The methods' training loops as the field's public code writes them: yardsticks for speed, and independent checks of engine and methods.

They know nothing of the engine: modules are replaced one by one, statistics and features come from hooks, every bit width is a run of
its own. In float64 they end with the engine's numbers. Each file says where the published code differs from what it does.

What makes them slow is kept on purpose; all of it is in the public code of the GDFQ family (GDFQ, Qimera, AdaDFQ,
IntraQ, and what was made from them) or of ZAQ:

1. The teacher's weights require gradients: each generator step computes them and nobody reads them.
2. Hooks on every BN layer append means, variances (two passes over each input) and, without end, the running statistics.
3. Upsampling makes four times the pixels before a 3x3 convolution reads them.
4. Fake quantization is six elementwise operations with a temporary each, for weights and activations.
5. The student runs in the warm-up, with a graph, though nothing is learned from it.
6. Every step waits for the device: accuracies go through numpy, losses through Python floats.
7. One student: each bit width pays for generator and teacher again.
8. float32, NCHW, eager mode, optimizers that loop over parameters.
9. Relations between positions keep their P x P matrix, and that of the teacher is computed with a graph (ZAQ).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfqbench_methods.textbook.loop import Loop

NAMES = {
    "gdfq": "TextbookGDFQ",
    "acq": "TextbookACQ",
    "zaq": "TextbookZAQ",
    "lrq": "TextbookLRQ",
    "gznq": "TextbookGZNQ",
    "zeroq": "TextbookZeroQ",
    "qimera": "TextbookQimera",
    "intraq": "TextbookIntraQ",
    "ait": "TextbookAIT",
}


def loops() -> dict[str, type[Loop]]:
    """By the method's name."""
    return {name: getattr(importlib.import_module(f"dfqbench_methods.textbook.{name}"), loop) for name, loop in NAMES.items()}
