"""Backend TensorRT."""
