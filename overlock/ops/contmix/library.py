"""The fused backends as operators of `torch.library`: with gradients, and opaque to torch.compile."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor


def register(name: str, backend: ModuleType) -> Callable[..., Tensor]:
    """Registers `overlock::contmix_<name>` and its backward pass.

    The operator keeps its inputs and the log-sum-exp of the logits, and no tap weights: the backward pass computes
    them again.

    Args:
        name: Name of the backend.
        backend: Has `forward(query, kernel, value, bias, rpb_small, rpb_large) -> (out, lse)` and
            `backward(grad, lse, query, ...)`, which gives the six gradients. Shapes:

            - query: (B, G d, H, W)
            - kernel: (B, G, d, k^2 + K^2), the regions projected to the taps of the small and the large kernel
            - value, out, grad: (B, 2 G d, H, W); `out` has the strides of `value`, where these are dense
            - bias: (k^2 + K^2,)
            - rpb_small, rpb_large: (G, 2k - 1, 2k - 1), (G, 2K - 1, 2K - 1)
            - lse: (2, B, G, H, W), float64 for float64 maps, else float32

    Returns:
        The operator, from the six inputs to `out`.
    """

    @torch.library.custom_op(f'overlock::contmix_{name}', mutates_args=())
    def operator(
        query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor
    ) -> tuple[Tensor, Tensor]:
        return backend.forward(query, kernel, value, bias, rpb_small, rpb_large)

    @operator.register_fake
    def _(query, kernel, value, bias, rpb_small, rpb_large):
        return torch.empty_like(value), empty_lse(value, kernel)

    @torch.library.custom_op(f'overlock::contmix_{name}_backward', mutates_args=())
    def gradient(
        grad: Tensor,
        lse: Tensor,
        query: Tensor,
        kernel: Tensor,
        value: Tensor,
        bias: Tensor,
        rpb_small: Tensor,
        rpb_large: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return backend.backward(grad, lse, query, kernel, value, bias, rpb_small, rpb_large)

    @gradient.register_fake
    def _(grad, lse, *inputs):
        return tuple(torch.empty_like(t) for t in inputs)

    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(output[1], *inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        return gradient(grad, *ctx.saved_tensors)

    operator.register_autograd(backward, setup_context=save)
    return lambda *inputs: operator(*inputs)[0]


def empty_lse(value: Tensor, kernel: Tensor) -> Tensor:
    """An empty (2, B, G, H, W) for the log-sum-exps."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.new_empty((2, *kernel.shape[:2], *value.shape[2:]), dtype=wide)
