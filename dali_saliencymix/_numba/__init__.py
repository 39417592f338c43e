"""CPU kernels compiled by Numba. Imported only if Numba is installed."""
