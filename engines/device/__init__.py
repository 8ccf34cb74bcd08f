"""Memory, streams and tensors of the device that computes."""
