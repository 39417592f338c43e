"""Kernels that Numba compiles for the CPU; imported only where Numba is installed."""
