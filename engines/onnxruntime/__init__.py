"""Backend for machines without a GPU."""
