"""Runs kernels in Triton's interpreter: what the source says, before any compiler.

The interpreter is repaired in three places where it computes something else than a GPU:

* ``tl.fma`` rounds twice (in triton 3.6; right since 3.9),
* float32 is cut to bfloat16, not rounded (3.6 and 3.9),
* a loop bound that was read from memory raises TypeError (3.6 with numpy >= 2.4).

Kernels are interpreted from copies, so that the same process can also compile them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

from fused_l2 import reference

_copies: dict[JITFunction, Any] = {}


def interpreted(kernel: JITFunction) -> InterpretedFunction:
    """A copy of a kernel, and of every kernel it calls, for the interpreter. Made once: rewriting a source takes longer than
    running it."""
    if kernel not in _copies:
        scope = dict(kernel.fn.__globals__)
        copy = types.FunctionType(kernel.fn.__code__, scope, kernel.fn.__name__, kernel.fn.__defaults__)
        functools.update_wrapper(copy, kernel.fn)
        del copy.__wrapped__  # or the source would be taken to need no rewriting
        _copies[kernel] = InterpretedFunction(copy)
        for name in kernel.fn.__code__.co_names:
            if isinstance(scope.get(name), JITFunction):
                scope[name] = interpreted(scope[name])
            elif isinstance(scope.get(name), tl.constexpr):  # a plain int on its left would not know it
                scope[name] = scope[name].value
    return _copies[kernel]


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    tensors = [torch.from_numpy(np.array(handle.data)) for handle in (x, y, z)]
    return TensorHandle(reference.fma(*torch.broadcast_tensors(*tensors)).numpy(), z.dtype.scalar)


def _rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = torch.from_numpy(np.array(x)).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(np.uint16)


@contextmanager
def repaired() -> Iterator[None]:
    """Triton's interpreter without the three faults, for one launch."""
    builder = interpreter.InterpreterBuilder
    fma, cast, patch = builder.create_fma, builder.cast_impl, interpreter._patch_lang_tensor
    patch_language, scopes = interpreter._patch_lang, []

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(_rounded_to_bfloat16(source.data), target.scalar)
        return cast(self, source, target)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    def patch_once(function: Any) -> Any:
        """triton.language for a kernel. Triton does it again for each function that the kernel calls, each time with nothing
        left to do, and that was half of the time of a launch."""
        if not scopes:
            scopes.append(patch_language(function))
        return scopes[0]

    builder.create_fma, builder.cast_impl, interpreter._patch_lang_tensor = _fma, cast_impl, patch_tensor
    interpreter._patch_lang = patch_once
    try:
        with np.errstate(all="ignore"):  # infinities and NaN are computed with on purpose
            yield
    finally:
        builder.create_fma, builder.cast_impl, interpreter._patch_lang_tensor = fma, cast, patch
        interpreter._patch_lang = patch_language
