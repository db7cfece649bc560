"""Kernels for GPUs, in Triton, which comes with PyTorch where that is built for them.

They take any number of channels. Whatever is summed is so in float32, and always in the
same order.
"""
