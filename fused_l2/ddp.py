"""Steps within the backward pass of a DistributedDataParallel model: each bucket of gradients once it has been averaged.

DDP calls hooks of a parameter before it averages. What comes after is its communication hook, of which a model has one: it
averages as DDP does, and steps the parameters of the bucket then, while later buckets are still computed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# What a model was given as its communication hook stays with it.
_averages: weakref.WeakKeyDictionary[Any, Average] = weakref.WeakKeyDictionary()

Step = Callable[[Tensor, Tensor], None]  # of a parameter, with a gradient


def average_of(ddp: Any) -> Average:
    """The communication hook of this model, registered if it has none yet.

    Raises:
        ValueError: if it hands over gradients that cannot be used at once.
    """
    _refuse_unused_parameters(ddp)
    if ddp not in _averages:
        made = Average(ddp)
        try:
            # Without annotations, of which DDP wants its own.
            ddp.register_comm_hook(made, lambda state, bucket: state.of_bucket(bucket))
        except RuntimeError as error:
            raise ValueError(
                f"step_in_backward: this DistributedDataParallel model has a communication hook of its own, or "
                f"mixed_precision, which is one, and cannot have another: {error}"
            ) from error
        _averages[ddp] = made
    return _averages[ddp]


def _refuse_unused_parameters(ddp: Any) -> None:
    for argument in ("find_unused_parameters", "static_graph"):
        if getattr(ddp, argument, False):
            raise ValueError(
                f"step_in_backward: with {argument}=True a DistributedDataParallel model hands over zeros for parameters that "
                f"had no gradient on any rank, and says only afterwards which they are. They would be stepped, and decay. Make "
                f"the model without {argument}, or step after backward()."
            )


def averaged_params(ddp: Any) -> list[Tensor]:
    """The parameters that this model averages. TypeError if it is no DistributedDataParallel model."""
    if not isinstance(ddp, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(f"ddp must be a torch.nn.parallel.DistributedDataParallel model, got {type(ddp).__name__}")
    ignored = ddp.parameters_to_ignore
    return [p for name, p in ddp.module.named_parameters() if p.requires_grad and name not in ignored]


class Average:
    """Averages gradients over the ranks of a model, and steps those parameters that somebody wants to be stepped."""

    def __init__(self, ddp: Any) -> None:
        self._ddp = weakref.ref(ddp)
        self._group, self._ranks = ddp.process_group, ddp.process_group.size()
        # What steps is no longer used when its optimizer is not.
        self._steps: dict[int, weakref.WeakMethod[Step]] = {}
        self._lock = threading.Lock()  # gloo has several threads that come back with an average

    def use(self, params: Iterable[Tensor], steps: Iterable[Step]) -> None:
        self._steps.update((id(param), weakref.WeakMethod(step)) for param, step in zip(params, steps, strict=True))

    def remove(self, params: Iterable[int]) -> None:
        """Step these (by id) no more."""
        for param in params:
            self._steps.pop(param, None)

    def of_bucket(self, bucket: Any) -> Any:
        """DDP's communication hook."""
        params, gradients = bucket.parameters(), bucket.gradients()
        found = [self._steps.get(id(param)) for param in params]
        steps = [
            (step, param, gradient)
            for reference, param, gradient in zip(found, params, gradients, strict=True)
            if reference is not None and (step := reference()) is not None
        ]
        ddp: Any = self._ddp()
        if steps:
            _refuse_unused_parameters(ddp)
            if ddp._join_config.enable:
                raise RuntimeError(
                    "step_in_backward: within join() a rank without input would step with gradients of zeros. Give all ranks "
                    "as many batches, or step after backward()."
                )
            _after_backward(functools.partial(_free, [param for _, param, _ in steps]))
        buffer = bucket.buffer()
        buffer.div_(self._ranks)
        averaged = torch.distributed.all_reduce(buffer, group=self._group, async_op=True).get_future()

        def step_all(done: Any) -> Any:
            done.value()  # raises if the ranks could not be asked
            with self._lock:
                for step, param, gradient in steps:
                    step(param, gradient)
            return buffer

        return averaged.then(step_all)


def _after_backward(call: Callable[[], None]) -> None:
    """Call this when DDP is ready with the pass: what DDP does last is queued after our callback, before our callback's."""
    engine = torch.autograd.Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(call))


def _free(params: list[Tensor]) -> None:
    for param in params:
        param.grad = None
