"""The Triton kernels, installed as ``fused_l2.kernels``.

* :mod:`~fused_l2.kernels.update_rules`: the formulas, on loaded values.
* :mod:`~fused_l2.kernels.multi_tensor`: the step: from the tensor table to pointers, and the loops that apply them.
* :mod:`~fused_l2.kernels.norms`, :mod:`~fused_l2.kernels.control`: clipping, loss scaling, skipped steps.
* :mod:`~fused_l2.kernels.coefficients`: coefficient rows where the host does not know the step count or the hyperparameters.
* :mod:`~fused_l2.kernels.write`: what a CUDA graph needs instead of copies from the host.
* :mod:`~fused_l2.kernels.launch`: what each of these is compiled from, and its launch.

Importing this package needs neither triton nor a GPU; its modules need triton.
"""
