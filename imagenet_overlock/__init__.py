"""ImageNet classification with OverLoCK on timm's parts: training and validation."""

from imagenet_overlock.recipe import Recipe, load_recipe

__all__ = ['Recipe', 'load_recipe']
