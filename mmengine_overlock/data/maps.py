"""Check label maps with their images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from mmengine_overlock.data.files import check_files, read_images, read_maps
from mmengine_overlock.data.findings import LayoutError
from mmengine_overlock.data.sizes import compare_sizes
from mmengine_overlock.data.statistics import Statistics, count_pixels


def pair_maps(
    folders: tuple[Path, Path],
    suffixes: tuple[str, str],
    images: Collection[str],
    maps: Collection[str],
    listing: Path | None,
    found: dict[str, list[str]],
) -> dict[str, str]:
    """Return the label map of each image, by their names.

    Args:
        folders: Of the images, and of the label maps.
        suffixes: Likewise.
        images: Files in the first.
        maps: Files in the second.
        listing: File with the names, without suffix, of the images that count; None for all of them.
        found: Items by kind; gets more.

    Raises:
        LayoutError: There are no images, or some lack a map.
    """
    # mmseg passes over hidden files.
    stems = [name.removesuffix(suffixes[0]) for name in images if name.endswith(suffixes[0]) and '/.' not in f'/{name}']
    if listing is not None and listing.is_file():
        stems = [line.strip() for line in listing.read_text().splitlines()]
    if not stems:
        raise LayoutError(f'{folders[0]} has no images *{suffixes[0]}')
    pairs = {stem + suffixes[0]: stem + suffixes[1] for stem in stems}
    lost = [image for image, label in pairs.items() if label not in maps]
    if lost:
        raise LayoutError(f'{len(lost)} of {len(pairs)} images have no label map, first {min(lost)}')
    for names, suffix in ((images, suffixes[0]), (maps, suffixes[1])):
        found['suffix'] += [
            name for name in names if name.lower().endswith(suffix.lower()) and not name.endswith(suffix)
        ]
    if listing is None:
        found['orphan'] += sorted({name for name in maps if name.endswith(suffixes[1])} - set(pairs.values()))
    return pairs


def check_maps(
    folders: tuple[Path, Path],
    pairs: Mapping[str, str],
    classes: Mapping[int, str],
    ignored: Collection[int],
    rotate: bool,
    found: dict[str, list[str]],
) -> tuple[bool, Statistics]:
    """Check images and label maps.

    Args:
        folders: Of the images, and of the label maps.
        pairs: The files of images and their label maps.
        classes: By value in the maps.
        ignored: Values of the maps that mean no class.
        rotate: Whether the run loads images rotated by EXIF.
        found: Items by kind (see `findings.KINDS`); gets more.

    Returns:
        Whether the run has to load the images without EXIF's rotation, and what the label maps hold.
    """
    images, maps = read_images(folders[0], list(pairs)), read_maps(folders[1], list(pairs.values()))
    check_files(images, len(pairs), found)
    check_files(maps, len(pairs), found)
    seen: set[int] = set()
    for name, file in maps.items():
        if file.problem or not file.mode:
            continue
        if not file.values:
            found['channels'].append(f'{name} ({file.mode})')
            continue
        wrong = [value for value in file.values if value not in classes and value not in ignored]
        if wrong:
            found['values'].append(f'{name} ({", ".join(map(str, wrong[:3]))}{", ..." * (len(wrong) > 3)})')
        elif not classes.keys() & set(file.values):
            found['ignored'].append(name)
        seen.update(file.values)
    found['unseen'] += [name for value, name in classes.items() if value not in seen]
    sizes = {image: maps[name].size for image, name in pairs.items() if name in maps and not maps[name].problem}
    return compare_sizes(images, sizes, rotate, found), count_pixels(maps, images.values(), classes)
