"""Fused backends as operators of `torch.library`: differentiable, and opaque to torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overlock.ops.contmix.inputs import Inputs, Projected

Forward = Callable[[Projected], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Projected], Projected]


def register(name: str, forward: Forward, backward: Backward) -> Callable[[Inputs], Tensor]:
    """Register `torch.ops.overlock.contmix_<name>` and `torch.ops.overlock.contmix_<name>_backward`.

    The operator keeps its inputs and the log-sum-exp of the logits, but no tap weights: `backward` computes them again.

    Args:
        name: Last part of the operator's name.
        forward: Takes the inputs. Returns the mixed map, (B, 2 G d, H, W), with the strides of the value where these
            are dense, and the log-sum-exps, (2, B, G, H, W), float64 for float64 maps, else float32.
        backward: Takes the gradient of the mixed map, the log-sum-exps and the inputs. Returns the gradients of the
            inputs, with their shapes, dtypes and strides.

    Returns:
        A function from the inputs to the mixed map, (B, C, H, W), that calls the operator.
    """
    parameters = ', '.join(f'Tensor {field}' for field in Projected._fields)
    results = ', '.join('Tensor' for _ in Projected._fields)
    schema = f'({parameters}) -> (Tensor, Tensor)'
    gradient_schema = f'(Tensor grad, Tensor lse, {parameters}) -> ({results})'

    @torch.library.custom_op(f'overlock::contmix_{name}', mutates_args=(), schema=schema)
    def operator(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return forward(Projected(*inputs))

    @operator.register_fake
    def _(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x = Projected(*inputs)
        wide = torch.promote_types(x.value.dtype, torch.float32)
        return torch.empty_like(x.value), x.value.new_empty((2, *x.kernel.shape[:2], *x.value.shape[2:]), dtype=wide)

    @torch.library.custom_op(f'overlock::contmix_{name}_backward', mutates_args=(), schema=gradient_schema)
    def gradient(grad: Tensor, lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return backward(grad, lse, Projected(*inputs))

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
    return lambda inputs: operator(*inputs.project())[0]
