"""Find a data set in COCO's format in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine_overlock.config import SPLITS
from mmengine_overlock.data.categories import leave_out_doubles
from mmengine_overlock.data.coco import read_coco
from mmengine_overlock.data.findings import LayoutError
from mmengine_overlock.data.folders import NO_VAL, DataFolder, Part, existing, listed, split_of, subfolders
from overlock.utils.errors import UserError

EXPECTED = (
    'annotations/*train*.json and annotations/*val*.json with folders of their images, or train/*.json and '
    'valid/*.json beside their images, as Roboflow exports COCO'
)
# Files of COCO that are no boxes of objects.
_OTHERS = ('captions', 'image_info', 'panoptic', 'person_keypoints', 'stuff')
_SAMPLE = 100


def find_coco(root: str | Path) -> DataFolder:
    """Find annotation files in COCO's format by the splits in their names or in those of their folders.

    The classes are the categories of the training file in the order of their ids, without those that are only the
    supercategory of others, as Roboflow exports. Images lie where the names in the annotation file exist.

    Raises:
        UserError: A split is missing, is there twice, or does not fit the others; one sentence says what was expected.
    """
    root = existing(root)
    files = _annotation_files(root)
    contents, parts, remarks = {}, {}, list[str]()
    folders, doubles = [root, *subfolders(root)], list[str]()
    for split, path in files.items():
        try:
            contents[split] = read_coco(path, None, labeled=True)
        except LayoutError as error:
            if split != 'test':
                raise UserError(f'{error}; expected an annotation file of boxes or masks in COCO format.') from None
            remarks.append(f'No test split, val is tested: {error}.')
            continue
        doubles += leave_out_doubles(contents[split])
        labeled = {str(item.get('image_id')) for item in contents[split]['annotations'] if isinstance(item, dict)}
        parts[split] = Part(_image_folder(path, contents[split], split, folders), path, len(labeled))
    classes = _classes(files, contents, remarks)
    names = [[category.get('name') for category in content['categories']] for content in contents.values()]
    ordered = not doubles and all([name for name in some if name in classes] == list(classes) for some in names)
    masks = _have_masks(contents, remarks)
    return DataFolder('coco', root, parts, classes, masks, ordered=ordered, remarks=tuple(remarks))


def _annotation_files(root: Path) -> dict[str, Path]:
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    every = sorted(path for pattern in ('*.json', '*/*.json') for path in root.glob(pattern))
    for path in every:
        if split := split_of(path, root):
            found[split].append(path)
    chosen: dict[str, Path] = {}
    for split, paths in found.items():
        paths = [path for path in paths if path.name.startswith('instances')] or paths
        objects = [path for path in paths if not path.name.startswith(_OTHERS)]
        paths = objects if objects or split == 'test' else paths
        if len(paths) > 1:
            raise UserError(
                f'{root} has {len(paths)} annotation files for {split} ({listed(paths, root)}), expected one; move the '
                f'others to another folder, or name the right one instances_{split}.json.'
            )
        if not paths and split != 'test':
            raise UserError(
                f'{root} has no annotation file for {split}: expected {EXPECTED}; got '
                f'{listed(every, root) or "no .json file"}{NO_VAL * bool(found["train"])}.'
            )
        if paths:
            chosen[split] = paths[0]
    return chosen


def _image_folder(ann_file: Path, content: Mapping[str, Any], split: str, folders: Sequence[Path]) -> Path:
    """Return the folder in which most images of an annotation file exist, none that is named after another split."""
    root = folders[0]
    # Paths of Windows, which the check of the data repairs.
    names = [str(image.get('file_name', '')).replace('\\', '/') for image in content['images']]
    sample = names[:: -(-len(names) // _SAMPLE)]
    # Names as 1.jpg exist in the folders of other splits too.
    own = {folder: split_of(folder, root) for folder in folders}
    scores = {
        folder: (sum((folder / name).is_file() for name in sample), own[folder] == split)
        for folder in folders
        if own[folder] in (split, None)
    }
    best = max(scores.values())
    found = [folder for folder, score in scores.items() if score == best]
    if not best[0]:
        raise UserError(
            f'{names[0]}, the first image of {ann_file}, is in no folder of {root} for {split} or for all, nor are '
            'others of that file; expected images by the names that the file gives as file_name.'
        )
    # Beside its images, as Roboflow puts it.
    found = [folder for folder in found if folder == ann_file.parent] or found
    if len(found) > 1:
        raise UserError(
            f'The images of {ann_file} lie in {len(found)} folders ({listed(found, root)}), expected one; move the '
            'others out.'
        )
    return found[0]


def _classes(files: Mapping[str, Path], contents: Mapping[str, Any], remarks: list[str]) -> tuple[str, ...]:
    used = {split: _used(content) for split, content in contents.items()}
    everywhere = set().union(*used.values())
    categories = contents['train']['categories']
    pairs = [(category.get('id'), category.get('name')) for category in categories]
    numbers, names = zip(*pairs, strict=True)
    if not all(isinstance(number, int) and isinstance(name, str) and name.strip() for number, name in pairs):
        raise UserError(f'{files["train"]} has a category without an id or a name; give each one a number and a name.')
    for values in (numbers, names):
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f'{files["train"]} has {twice[0]!r} as two categories; give each one an id and a name.')
    parents = {str(item.get('supercategory')) for item in categories if item.get('supercategory') != item['name']}
    groups = [name for name in names if name in parents and name not in everywhere]
    if groups:
        remarks.append(f'No class: {listed(groups)}, only the supercategory of others and without annotations.')
    for split, found in used.items():
        if strange := sorted(found.difference(names)):
            raise UserError(
                f'{files[split]} has annotations of {listed(strange)}, which the categories of {files["train"]} lack '
                f'({listed(names)}); nothing can be learned about them: correct the names, or remove them.'
            )
    return tuple(name for _, name in sorted(pairs) if name not in groups)


def _used(content: Mapping[str, Any]) -> set[str]:
    """Return the names of the categories that have annotations."""
    numbers = {str(item.get('category_id')) for item in content['annotations'] if isinstance(item, dict)}
    return {str(category.get('name')) for category in content['categories'] if str(category.get('id')) in numbers}


def _have_masks(contents: Mapping[str, Any], remarks: list[str]) -> bool:
    """Return whether more than half of the annotations of each split have a mask: training on masks drops the rest."""
    result = True
    for split, content in contents.items():
        masks = [bool(item.get('segmentation')) for item in content['annotations'] if isinstance(item, dict)]
        if 2 * sum(masks) <= len(masks):
            result = False
            remarks.append(
                f'Boxes alone: {len(masks) - sum(masks)} of {len(masks)} annotations of {split} have no mask.'
            )
    return result
