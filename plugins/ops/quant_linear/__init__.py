"""QuantLinear: see `pascalvl.plugins.ops.quant_linear.op`."""
