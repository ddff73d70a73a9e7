"""GPU kernels, installed as ``fused_l2.kernels``. None are part of this version: CUDA tensors take the plain-PyTorch engine.

This module must stay importable without triton and without a GPU.
"""
