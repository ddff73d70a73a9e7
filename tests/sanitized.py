"""What tests/test_gpu.py runs under compute-sanitizer: steps of both rules, clipped or not, aligned or not."""

from __future__ import annotations

import sys

import torch

import fused_l2
from fused_l2.engines.cuda_part import CudaPart

SIZES = (1, 7, 127, 1024, 1025, 8192, 100_003, 0)


def main(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        memory = [torch.ones(n + 1, dtype=dtype, device=device) for n in SIZES]
        params = [torch.nn.Parameter(view) for m in memory for view in (m[1:], m[:-1].clone())]
        for p in params:
            p.grad = torch.ones_like(p)
        clipped = fused_l2.AdamW(params, max_grad_norm=1.0, statistics=True, low_precision="round")
        for optimizer in (clipped, fused_l2.SGD(params, lr=0.1, momentum=0.9, low_precision="round")):
            for _ in range(2):
                optimizer.step()
            assert optimizer._stepper._plan is not None
            assert device == "cpu" or all(isinstance(part, CudaPart) for part in optimizer._stepper._plan.parts)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
