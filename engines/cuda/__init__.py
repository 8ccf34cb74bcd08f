"""The exported graphs as plans of kernel launches: no library but the kernels and the driver."""
