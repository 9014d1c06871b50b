"""Attention on CUDA devices: Numba kernels, and one host path for a GPU and for the emulator."""
