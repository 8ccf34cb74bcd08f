"""The PyTorch modules that are exported, with the kernels."""
