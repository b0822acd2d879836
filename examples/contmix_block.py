#!/usr/bin/env python
"""Put the ContMix block into a ResNet and into a vision transformer of timm, and train a step of each."""

import sys
from pathlib import Path
from typing import Any

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock import ContMixBlock


class OnPatches(nn.Module):
    """Run a block for maps on the patch tokens of a vision transformer; other tokens stay as they are."""

    def __init__(self, block: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.block, self.grid = block, grid

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, C), the patches last, to the same shape."""
        height, width = self.grid
        patches = tokens[:, -height * width :]
        maps = patches.transpose(1, 2).unflatten(2, self.grid).contiguous()  # (B, C, H, W)
        return torch.cat([tokens[:, : -height * width], self.block(maps).flatten(2).transpose(1, 2)], dim=1)


def resnet() -> nn.Module:
    """Return a ResNet-18 with a ContMix block at the end of its third stage, at stride 16."""
    model: Any = timm.create_model('resnet18', num_classes=10)
    model.layer3.append(ContMixBlock(256, num_heads=4, kernel_size=13))
    return model


def transformer() -> nn.Module:
    """Return a ViT-Ti/16 whose sixth block is a ContMix block."""
    model: Any = timm.create_model('vit_tiny_patch16_224', num_classes=10)
    model.blocks[5] = OnPatches(ContMixBlock(192, num_heads=3, kernel_size=13), model.patch_embed.grid_size)
    return model


def train_step(model: nn.Module) -> float:
    """Train a step on two random images, print the shapes around each ContMix block, and return the loss."""

    def show(block: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        print(f'  ContMixBlock: {tuple(args[0].shape)} -> {tuple(out.shape)}')

    for module in model.modules():
        if isinstance(module, ContMixBlock):
            module.register_forward_hook(show)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(torch.randn(2, 3, 224, 224)), torch.tensor([3, 7]))
    loss.backward()
    optimizer.step()
    print(f'  loss {loss.item():.3f}')
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    for name, build in {'ResNet-18': resnet, 'ViT-Ti/16': transformer}.items():
        print(name)
        train_step(build())


if __name__ == '__main__':
    main()
