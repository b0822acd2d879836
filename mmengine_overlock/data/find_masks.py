"""Find images and label maps in a folder."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmengine_overlock.config import SPLITS
from mmengine_overlock.data.files import read_maps, scan
from mmengine_overlock.data.folders import NO_VAL, DataFolder, Part, existing, listed, split_of, subfolders
from overlock.utils.errors import UserError
from overlock.utils.files import IMAGE_SUFFIXES

EXPECTED = 'images/train, images/val, masks/train, masks/val, or train/images, train/masks, val/images, val/masks'
_IMAGES = ('image', 'images', 'img', 'img_dir', 'imgs')
_MAPS = ('ann_dir', 'annotation', 'annotations', 'gt', 'label', 'label_maps', 'labels', 'mask', 'masks')
NAME_FILES = ('classes.txt', 'labels.txt', 'names.txt', 'classes.json', 'labels.json', 'objectInfo150.txt')
# Of Roboflow, which puts label maps of this ending and this file of names beside the images of each split.
ROBOFLOW, _BESIDE = '_classes.csv', '_mask.png'
_SAMPLE = 20
IGNORED = 255


def find_masks(root: str | Path) -> DataFolder:
    """Find images and label maps of one channel, whose values are classes and 255 what is ignored.

    Classes are named by a file: a name a line (`classes.txt`, `labels.txt`, `names.txt`) or a JSON list, from value 0
    on; a JSON object of names by value; ADE20K's `objectInfo150.txt`; or Roboflow's `_classes.csv`. Names that start at
    value 1 make value 0 mean unlabeled, as in ADE20K. Without a file, the values in the maps are the classes.

    Raises:
        UserError: A split is missing, is there twice, or does not fit the others; one sentence says what was expected.
    """
    root = existing(root)
    parts = _parts(root)
    suffixes = {split: _suffixes(part) for split, part in parts.items()}
    for split, part in parts.items():
        images = sum(name.endswith(suffixes[split][0]) for name in scan(part.images))
        parts[split] = replace(part, count=images)
    if len(set(suffixes.values())) > 1:
        theirs = '; '.join(f'{split} {" and ".join(pair)}' for split, pair in suffixes.items())
        raise UserError(f'{root} has files of other suffixes in each split ({theirs}), expected the same in all.')
    names = _names([*(root / name for name in NAME_FILES), parts['train'].labels / ROBOFLOW])
    for part in parts.values():
        if _names([part.labels / ROBOFLOW]) not in (None, names):
            raise UserError(f'{part.labels / ROBOFLOW} has other values or names than train, expected the same in all.')
    remarks = []
    if names is None:
        names = _names_by_value(parts, suffixes['train'][1])
        remarks.append(f'Classes are named by value: none of {", ".join(NAME_FILES)} is in {root}.')
    unlabeled = 0 not in names
    if unlabeled:
        remarks.append('Value 0 of the label maps is ignored: the names of the classes start at value 1.')
    classes = tuple(names[value] for value in sorted(names))
    if len(classes) < 2:
        raise UserError(
            f'The label maps of {root} have one class ({listed(classes)}), expected two or more; give what is none of '
            'the others, the background, a value and a name of its own.'
        )
    return DataFolder('masks', root, parts, classes, True, suffixes['train'], unlabeled, remarks=tuple(remarks))


def _parts(root: Path) -> dict[str, Part]:
    """Pair folders whose paths differ only in `images` and `masks` or the like, by their split; Roboflow has one."""
    found: dict[str, list[Part]] = {}
    folders = subfolders(root)
    for folder in folders:
        split, parts = split_of(folder, root), folder.relative_to(root).parts
        places = [place for place, part in enumerate(parts) if part.lower() in _IMAGES]
        if split is None or not places:
            continue
        place = places[-1]
        for other in folders:
            theirs = other.relative_to(root).parts
            same = theirs[:place] + theirs[place + 1 :] == parts[:place] + parts[place + 1 :]
            if same and len(theirs) == len(parts) and theirs[place].lower() in _MAPS:
                found.setdefault(split, []).append(Part(folder, other))
    paired = {*found}
    for folder in folders:
        if (folder / ROBOFLOW).is_file() and (split := split_of(folder, root)) and split not in paired:
            found.setdefault(split, []).append(Part(folder, folder))
    for split in SPLITS:
        pairs = found.get(split, [])
        if not pairs and split != 'test':
            raise UserError(
                f'{root} has no images with label maps for {split}: expected {EXPECTED}; got '
                f'{listed(folders, root) or "no folders"}{NO_VAL * ("train" in found)}.'
            )
        if len(pairs) > 1:
            several = sorted({path for pair in pairs for path in (pair.images, pair.labels)})
            raise UserError(
                f'{root} has several folders of images or label maps for {split} '
                f'({listed(several, root)}), expected one of each; move the others out.'
            )
    return {split: found[split][0] for split in SPLITS if split in found}


def _suffixes(part: Part) -> tuple[str, str]:
    """Return what the names of images and of their label maps end in."""
    beside = part.images == part.labels
    images = [Path(name) for name in sorted(scan(part.images)) if not Path(name).name.startswith('.')]
    images = [path for path in images if not (beside and path.name.endswith(_BESIDE))]
    kinds = Counter(path.suffix for path in images if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(kinds) != 1:
        got = ', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items())) or f'no {"/".join(IMAGE_SUFFIXES)}'
        raise UserError(f'{part.images} must have images of one suffix, which mmseg reads by it; got {got}.')
    suffix = next(iter(kinds))
    if beside and suffix == '.png':
        raise UserError(
            f'{part.images} has images and label maps of one suffix, {suffix}, which mmseg takes all for images; move '
            f'them to images and masks, as in images/train and masks/train, and {ROBOFLOW} with the maps.'
        )
    stems = [path.as_posix().removesuffix(suffix) for path in images if path.suffix == suffix][:_SAMPLE]
    maps = [name for name in scan(part.labels) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    maps = [name for name in maps if not beside or name.endswith(_BESIDE)]
    endings = Counter(name.removeprefix(stem) for stem in stems for name in maps if name.startswith(stem))
    if not endings:
        raise UserError(
            f'{part.labels} has no label map for {stems[0]}{suffix} of {part.images}; expected maps that are named as '
            f'the images, as {stems[0]}.png or {stems[0]}_mask.png.'
        )
    # Where `1.png` and `10.png` both start with `1`, one ending fits more images, or begins with no digit.
    most = sorted(ending for ending, count in endings.items() if count == max(endings.values()))
    most = [ending for ending in most if not ending[:1].isalnum()] or most
    most = [ending for ending in most if ending.startswith('.')] or most
    if len(most) > 1:
        raise UserError(
            f'{part.labels} has several label maps for each image, {listed([stems[0] + ending for ending in most])}, '
            'expected one; move the others out.'
        )
    return suffix, most[0]


def _names(paths: Sequence[Path]) -> dict[int, str] | None:
    """Return the names of the classes by value from that of these files that exists, if one does."""
    files = [path for path in paths if path.is_file()]
    if not files:
        return None
    if len(files) > 1:
        raise UserError(f'There are several files of class names, {listed(files)}, expected one; remove the others.')
    try:
        names = _read_names(files[0])
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{files[0]} cannot be read ({error}); expected a name a line, or in JSON a list of names or an object '
            'of names by value.'
        ) from None
    values = sorted(names)
    if not values or values[0] not in (0, 1) or values != list(range(values[0], values[-1] + 1)):
        raise UserError(f'{files[0]} names the values {listed(values) or "none"}; expected 0, 1, 2, ... or 1, 2, ...')
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise UserError(f'{files[0]} has the name {twice[0]!r} twice; expected a name of its own for each class.')
    return names


def _read_names(path: Path) -> dict[int, str]:
    text = path.read_text(encoding='utf-8-sig')
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if path.name == 'objectInfo150.txt':
        # Idx, Ratio, Train, Val, Stuff, Name.
        return {int(line.split('\t')[0]): line.split('\t')[-1].strip() for line in lines[1:]}
    if path.name == ROBOFLOW:
        rows = csv.reader(lines, skipinitialspace=True)
        return {int(value): name for value, name in rows if value != 'Pixel Value'}
    if path.suffix == '.txt':
        _check_lines(lines)
    content = json.loads(text) if path.suffix == '.json' else lines
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    names = {int(value): name for value, name in pairs}
    if strange := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(f'{strange[0]!r} is not a name')
    return names


def _check_lines(lines: Sequence[str]) -> None:
    """Raise a ValueError where lines of names would give names to other values than was meant."""
    if '' in lines:
        raise ValueError(f'line {lines.index("") + 1} is empty')
    numbers = [int(found[0]) for line in lines if (found := re.match(r'\d+(?=[\W_])', line))]
    if len(numbers) == len(lines) > 1 and numbers == [*range(numbers[0], numbers[-1] + 1)]:
        raise ValueError('its lines begin with numbers, which are no part of a name')


def _names_by_value(parts: Mapping[str, Part], suffix: str) -> dict[int, str]:
    seen: set[int] = set()
    for part in parts.values():
        maps = read_maps(part.labels, [name for name in scan(part.labels) if name.endswith(suffix)])
        # A broken file is left to the check of the data, which names all of them.
        if strange := sorted(name for name, file in maps.items() if file.mode and not file.values):
            raise UserError(
                f'{part.labels} has maps of several channels ({listed(strange)}), expected one channel whose values '
                'are the classes 0, 1, 2, ...; convert colors to these values.'
            )
        seen.update(value for file in maps.values() for value in file.values)
    values = sorted(seen - {IGNORED})
    # Gray levels, such as 0, 128 and 200, would make a hundred classes that do not exist.
    if len(values) < 2 or 8 * len(values) <= values[-1]:
        raise UserError(_strange_values(sorted(seen)))
    return {value: f'class {value}' for value in range(values[-1] + 1)}


def _strange_values(values: Sequence[int]) -> str:
    return (
        f'The values of the label maps are {listed(values) or "none"}, which are no classes; expected 0, 1, 2, ... '
        f'without large gaps, and {IGNORED} for what is ignored; convert the maps, or name the classes in classes.txt.'
    )
