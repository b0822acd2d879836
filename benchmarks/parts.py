"""The time of each part of a step, forward and backward."""

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Clock:
    """The seconds of each part of a step; a part's backward pass begins when a gradient of its outputs arrives.

    Attributes:
        on: Whether it runs; where it does not, a GPU need not be waited for at each part.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.seconds, self.part, self.on = cuda, defaultdict[str, float](float), 'other', False
        self.since = time.perf_counter()

    def enter(self, part: str) -> str:
        """Begin a part, and return the one that ends."""
        if not self.on:
            return self.part
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        before, self.part, self.since = self.part, part, now
        return before

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Make a method of an object a part."""
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            outs = inner(*args, **kwargs)
            if self.on and torch.is_grad_enabled():
                for out in tensors(outs):
                    if out.requires_grad:
                        out.register_hook(lambda grad: self.enter(f'{part}, backward') and None)
            self.enter(before)
            return outs

        setattr(owner, method, outer)


def tensors(outs: Any) -> list[Tensor]:
    """Return the tensors in nested lists and tuples."""
    if isinstance(outs, (list, tuple)):
        return [tensor for out in outs for tensor in tensors(out)]
    return [outs] if isinstance(outs, Tensor) else []
