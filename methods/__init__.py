"""The methods: one file each. What several share is in `dfqbench_methods.parts`."""

# A method's place decides its colour and marker in every plot, also in those that are published: a new one goes to the end.
ORDER = (
    *("acq", "ait", "gdfq", "gznq", "intraq", "lrq", "qimera", "round", "zaq", "zeroq", "checkpoint", "squant", "dfq", "qat", "gaussian", "tszsq"),
    *("slq", "mlq"),
)
