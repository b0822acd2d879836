"""Compare the sizes of images with those of their labels, EXIF rotations included."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine_overlock.data.files import ImageFile


def compare_sizes(
    files: Mapping[str, ImageFile], labeled: Mapping[str, tuple[int, int]], rotate: bool, found: dict[str, list[str]]
) -> bool:
    """Find images whose size as loaded is not that of their labels.

    Labels that follow the pixels as stored are right where images are loaded so, and images of one data set are all
    loaded alike: the sizes of those that EXIF turns by 90 degrees show which way that is.

    Args:
        files: Images by name.
        labeled: (width, height) of their labels, by name.
        rotate: Whether the run loads images rotated by EXIF, as OpenCV does by default.
        found: Items by kind; gets more.

    Returns:
        Whether the run has to load the images without EXIF's rotation.
    """
    follow: list[str] = []
    ignore: list[str] = []
    unclear: list[str] = []
    for name, size in labeled.items():
        file = files.get(name)
        if file is None or file.problem or not file.mode:
            continue
        loaded, stored = file.loaded_size(rotate), file.size
        if size not in (loaded, stored):
            found['size'].append(f'{name} ({_text(loaded)}, its labels {_text(size)})')
        elif rotate and file.orientation > 1:
            (unclear if loaded == stored or file.orientation < 5 else follow if size == loaded else ignore).append(name)
    if ignore and follow:
        found['rotations'] += ignore
    elif ignore:
        found['rotated'] += ignore
    elif not follow:
        found['rotation'] += unclear
    return bool(ignore and not follow)


def _text(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'
