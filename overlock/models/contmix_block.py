"""The authors' plug-and-play block: ContMix in any network, with one map for features and context."""

from types import NoneType
from typing import Any

from torch import Tensor, nn

from overlock.layers import ConvNorm
from overlock.layers.large_kernel import BRANCHES
from overlock.models.forms import Foldable
from overlock.models.mixing import NUM_REGIONS, MixingBlock
from overlock.models.names import CONTMIX_BLOCK, to_published
from overlock.models.network import check_counts, check_rate, run_block
from overlock.ops.contmix.dispatch import check_backend
from overlock.ops.resize import adaptive_avg_pool2d


class ContMixBlock(MixingBlock, Foldable):
    """Mix a map with kernels computed from the affinity of each pixel to 7x7 regions of it, then its channels.

    It keeps the shape of any map (B, dim, H, W): it goes behind or in place of a block of a ResNet, ConvNeXt, or a ViT
    whose tokens are laid out as a map (examples/contmix_block.py). State dicts have our names or the authors'.
    Convolutions start as PyTorch's, position biases from a truncated normal with std 0.02.

    Args:
        dim: Channels, a multiple of 4 x `num_heads`.
        num_heads: ContMix has 2 x `num_heads` groups for each of its two kernels.
        kernel_size: The large kernel of ContMix and of the local branch, a key of
            `overlock.layers.large_kernel.BRANCHES`. Smaller maps are enlarged for ContMix.
        smk_size: The small kernel of ContMix, odd and at most `kernel_size`.
        mlp_ratio: Hidden width of the feed-forward over `dim`, rounded down.
        res_scale: Whether layer scale is on the shortcuts, or else on the branches.
        ls_init_value: Initial value of layer scale; None for no layer scale.
        drop_path: Probability of dropping the branch of a sample while training.
        with_cp: Whether to recompute activations in the backward pass to save memory.
        deploy: Whether to build the folded form of `switch_to_deploy`.
        contmix_backend: Backend of `overlock.ops.contmix`.

    Raises:
        ValueError: If the arguments do not make a block.
    """

    names = CONTMIX_BLOCK

    def __init__(
        self,
        dim: int = 64,
        num_heads: int = 2,
        kernel_size: int = 7,
        smk_size: int = 5,
        mlp_ratio: float = 4,
        res_scale: bool = False,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        with_cp: bool = False,
        deploy: bool = False,
        contmix_backend: str = 'auto',
    ) -> None:
        check_counts(dim=dim, num_heads=num_heads, kernel_size=kernel_size, smk_size=smk_size)
        if dim % (4 * num_heads):
            raise ValueError(f'dim must be a multiple of 4 x num_heads, got dim {dim} and num_heads {num_heads}')
        if kernel_size not in BRANCHES:
            raise ValueError(f'kernel_size must be one of {sorted(BRANCHES)}, got {kernel_size}')
        if smk_size % 2 == 0 or smk_size > kernel_size:
            raise ValueError(f'smk_size must be odd and at most kernel_size {kernel_size}, got {smk_size}')
        if not isinstance(mlp_ratio, (int, float)) or dim * mlp_ratio < 1:
            raise ValueError(f'mlp_ratio must be a positive number, got {mlp_ratio!r}')
        if isinstance(ls_init_value, bool) or not isinstance(ls_init_value, (int, float, NoneType)):
            raise ValueError(f'ls_init_value must be a number, or None for no layer scale, got {ls_init_value!r}')
        check_rate(drop_path=drop_path)
        check_backend(contmix_backend)
        super().__init__(
            width=dim,
            channels=dim,
            key_channels=dim,
            kernel_sizes=(smk_size, kernel_size),
            num_groups=2 * num_heads,
            local_kernel_size=kernel_size,
            hidden=int(dim * mlp_ratio),
            fusion=nn.Identity(),
            drop_path_rate=drop_path,
            layer_scale=None if ls_init_value is None else float(ls_init_value),
            scale_shortcut=res_scale,
            contmix_backend=contmix_backend,
        )
        self.with_cp = with_cp
        self._shape: dict[str, Any] = dict(
            dim=dim,
            num_heads=num_heads,
            kernel_size=kernel_size,
            smk_size=smk_size,
            mlp_ratio=mlp_ratio,
            res_scale=res_scale,
            ls_init_value=ls_init_value,
        )
        self.value = ConvNorm(dim, dim)
        for rpb in (self.rpb_small, self.rpb_large):
            nn.init.trunc_normal_(rpb, std=0.02)
        if deploy:
            self.switch_to_deploy()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, H, W), of any height and width, to the same shape.

        Raises:
            ValueError: If the map has another number of channels or axes.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f'input must have shape (B, {self.channels}, H, W), got {tuple(x.shape)}')
        return run_block(self, x, forward=self.run)

    def project(self, x: Tensor, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (B, dim / 2, H, W), key (B, dim / 2, 7, 7) and value (B, dim, H, W), all of the normed map."""
        return self.query(x), self.key(adaptive_avg_pool2d(x, (NUM_REGIONS, NUM_REGIONS))), self.value(x)

    def switch_to_deploy(self) -> 'ContMixBlock':
        """Fold all linear steps for inference, in place and idempotently, and return self."""
        self.fold()
        return self

    def _rebuilt(self) -> 'ContMixBlock':
        return ContMixBlock(**self._shape)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the block under the authors' names.

        Raises:
            CheckpointError: If the block is folded: no names were published for this form.
        """
        return to_published(self.state_dict(), names=CONTMIX_BLOCK)
