"""Turn images into batches with timm's data sets, transforms and loaders."""

from __future__ import annotations

from typing import Any

import numpy as np
from timm.data import ImageDataset, create_loader, create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader
from timm.utils import random_seed
from torch import Tensor, nn

from imagenet_overlock.distributed import World
from imagenet_overlock.folder import Split, decode
from imagenet_overlock.recipe import Recipe
from overlock.utils.errors import UserError


class EveryImage(ImageDataset):
    """timm's data set, except that an image that cannot be decoded is an error; timm takes the next one instead."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.reader.samples[index]
        return self.transform(decode(path)), target


def train_loader(recipe: Recipe, split: Split, world: World, model: nn.Module) -> PrefetchLoader:
    """Return augmented batches of this process, already on its device, without incomplete ones.

    Raises:
        UserError: If timm does not know the augmentation.
    """
    try:
        create_transform(32, is_training=True, auto_augment=recipe.aa or None)
    except (AssertionError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            "The setting aa takes the name of one of timm's augmentations, such as rand-m9-mstd0.5-inc1, 3a, "
            f'augmix-m3-w3 or original, got {recipe.aa} ({error}).'
        ) from None
    loader = _loader(
        ImageDataset(str(split.root), class_map=_class_map(split.classes)),
        resolve_data_config({'img_size': recipe.img_size, 'interpolation': recipe.train_interpolation}, model=model),
        recipe.batch_size,
        recipe.workers,
        world,
        is_training=True,
        re_prob=recipe.reprob,
        re_mode='pixel',
        scale=recipe.scale,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.aa or None,
        distributed=world.is_distributed,
    )
    if world.is_distributed:
        loader.sampler.seed = recipe.seed
    return loader


def val_loader(
    split: Split,
    world: World,
    model: nn.Module,
    batch_size: int,
    workers: int = 4,
    img_size: int | None = None,
    crop_pct: float | None = None,
    classes: tuple[str, ...] | None = None,
) -> PrefetchLoader:
    """Return batches of this process's share of a split, on its device; each image is in exactly one share.

    The model's `pretrained_cfg` gives the preprocessing where `img_size` (pixels) and `crop_pct` (side of the center
    crop over that of the resized image) are None; images above the model's size are not cropped. `classes` are those of
    the model by index, by default those of the split.
    """
    config = resolve_data_config({'img_size': img_size, 'crop_pct': crop_pct}, model=model)
    if crop_pct is None and config['input_size'][-1] > resolve_data_config({}, model=model)['input_size'][-1]:
        config['crop_pct'] = 1.0
    dataset = EveryImage(str(split.root), class_map=_class_map(classes or split.classes))
    # timm's sampler for several processes repeats images so that all have as many.
    dataset.reader.samples = dataset.reader.samples[world.rank :: world.size]
    return _loader(dataset, config, batch_size, workers, world)


def _loader(
    dataset: ImageDataset, config: dict[str, Any], batch_size: int, workers: int, world: World, **options: Any
) -> PrefetchLoader:
    return create_loader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=world.device.type == 'cuda',
        device=world.device,
        # Workers that lived on would carry random states over from epoch to epoch, and no run could resume exactly.
        persistent_workers=False,
        **config,
        **options,
    )


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Make everything random in an epoch of a process, workers included, depend only on these numbers."""
    random_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]))


def _class_map(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: index for index, name in enumerate(classes)}
