"""Check and repair the categories of a file in COCO's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmengine_overlock.data.classes import find_misspelt


def leave_out_doubles(content: dict[str, Any]) -> list[str]:
    """Leave out categories without annotations that have the name of another one, in place, and return their names.

    Roboflow exports one, before the class, where a project is named as its class. Of those of a name that all have no
    annotations the last one stays.
    """
    used = {str(item.get('category_id')) for item in content.get('annotations') or () if isinstance(item, dict)}
    # A name of another type is refused later.
    left = Counter(name for category in content['categories'] if isinstance(name := category.get('name'), str))
    kept, doubles = [], []
    for category in content['categories']:
        name = category.get('name')
        if isinstance(name, str) and left[name] > 1 and str(category.get('id')) not in used:
            left[name] -= 1
            doubles.append(name)
        else:
            kept.append(category)
    content['categories'] = kept
    return doubles


def check_categories(content: dict[str, Any], classes: Sequence[str], found: dict[str, list[str]]) -> None:
    """Put the categories into the order of the classes, and add those that lack.

    mmdet numbers the categories that are classes in the order of the file and without gaps, so that one in another
    place, or one that lacks, gives others a wrong label.
    """
    found['double'] += leave_out_doubles(content)
    by_name: dict[Any, dict] = {}
    ids = set()
    for category in content['categories']:
        name, number = category.get('name'), category.get('id')
        if not isinstance(number, int) or not isinstance(name, str) or number in ids or name in by_name:
            found['classes'].append(f'category {name} with id {number}')
            continue
        ids.add(number)
        by_name[name] = category
    if found['classes']:
        return
    theirs, ours = [name for name in by_name if name in classes], [name for name in classes if name in by_name]
    found['order'] += [f'{name} for {right}' for name, right in zip(theirs, ours, strict=True) if name != right]
    found['unknown'] += [name for name in by_name if name not in classes]
    absent = [name for name in classes if name not in by_name]
    found['absent'] += absent
    found['misspelt'] += find_misspelt(absent, found['unknown'])
    by_name |= {name: dict(id=max(ids) + place, name=name) for place, name in enumerate(absent, 1)}
    content['categories'] = [by_name.pop(name) for name in classes] + list(by_name.values())
