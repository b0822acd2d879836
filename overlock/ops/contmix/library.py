"""Fused backends as operators of `torch.library`: differentiable, and opaque to torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overlock.ops.contmix.inputs import Projected

Forward = Callable[[Projected], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Projected], Projected]


def register(name: str, forward: Forward, backward: Backward) -> Callable[[Projected], Tensor]:
    """Register `torch.ops.overlock.contmix_<name>` and `torch.ops.overlock.contmix_<name>_backward`.

    The operator keeps its inputs and the log-sum-exp of the logits, but no tap weights: `backward` computes them again.

    Args:
        name: Last part of the operator's name.
        forward: Takes the inputs. Returns the mixed map, (B, 2 G d, H, W), with the strides of the value where these
            are dense, and the log-sum-exps, (2, B, G, H, W), float64 for float64 maps, else float32.
        backward: Takes the gradient of the mixed map, the log-sum-exps and the inputs. Returns the gradients of the
            inputs, with their shapes and dtypes.

    Returns:
        The operator, from the inputs to the mixed map.
    """

    @torch.library.custom_op(f'overlock::contmix_{name}', mutates_args=())
    def operator(
        query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor
    ) -> tuple[Tensor, Tensor]:
        return forward(Projected(query, kernel, value, bias, rpb_small, rpb_large))

    @operator.register_fake
    def _(query: Tensor, kernel: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(value.dtype, torch.float32)
        lse = value.new_empty((2, *kernel.shape[:2], *value.shape[2:]), dtype=wide)
        return torch.empty_like(value), lse

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
        return backward(grad, lse, Projected(query, kernel, value, bias, rpb_small, rpb_large))

    @gradient.register_fake
    def _(grad: Tensor, lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in inputs)

    def save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], *inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return (None,) * 6 if grad is None else gradient(grad, *ctx.saved_tensors)

    operator.register_autograd(differentiate, setup_context=save)
    return lambda inputs: operator(*inputs)[0]
