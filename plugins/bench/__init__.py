"""Benchmarks of the kernels on a GPU; `README.md` has the last results."""
