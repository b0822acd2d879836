"""Squeeze-and-excitation."""

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scales each channel by a sigmoid of the globally pooled map (Hu et al., 2018), GELU inside.

    Args:
        channels: Channels of the map.
        reduction: The hidden width is `channels // reduction`, at least 16.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(channels // reduction, 16)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        scale = self.fc2(self.act(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * scale.sigmoid()
