#!/usr/bin/env python
"""Write the generated parts of documents: tables of weights, model-index.yml and figures of the architecture."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(ROOT))

from overlock import ARCHS, OverLoCK  # noqa: E402
from overlock.checkpoint import WEIGHTS, Weights  # noqa: E402
from overlock.utils.files import whole_file  # noqa: E402
from tools.figures import network_figure, package_figure  # noqa: E402

_RESULTS = {
    'classification': ('Image Classification', 'ImageNet-1K', {'top1': 'Top 1 Accuracy'}),
    'detection': ('Instance Segmentation', 'COCO', {'box_ap': 'box AP', 'mask_ap': 'mask AP'}),
    'segmentation': ('Semantic Segmentation', 'ADE20K', {'miou': 'mIoU (single scale)'}),
}


@cache
def parameters(arch: str, form: str = 'training') -> int:
    """Return the number of parameters of a classifier in one of the published forms, both heads included."""
    with torch.device('meta'):
        model = OverLoCK(arch).to_form(form)
    return sum(parameter.numel() for parameter in model.parameters())


def model_index() -> dict[str, Any]:
    """Return the published weights in the form of OpenMMLab's model-index.yml; results are paper-reported."""
    collection = dict(
        Name='OverLoCK',
        README='README.md',
        Metadata=dict(Architecture=['Base-Net', 'Overview-Net', 'Focus-Net', 'ContMix']),
        Paper=dict(
            URL='https://arxiv.org/abs/2502.20087',
            Title='OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels',
        ),
    )
    return dict(Collections=[collection], Models=[_entry(name, weights) for name, weights in WEIGHTS.items()])


def _entry(name: str, weights: Weights) -> dict[str, Any]:
    task, dataset, metrics = _RESULTS[weights.task]
    entry: dict[str, Any] = {'Name': name, 'In Collection': 'OverLoCK'}
    if weights.task == 'classification':
        entry['Metadata'] = dict(Parameters=parameters(weights.arch, weights.form), Form=weights.form)
    else:
        entry['Config'] = f'configs/{weights.config}.py'
    entry['Results'] = [
        dict(
            Task=task,
            Dataset=dataset,
            Source='paper',
            Metrics={metrics[key]: value for key, value in weights.metrics.items()},
        )
    ]
    entry['Weights'] = weights.url
    return entry


def parts() -> dict[str, dict[str, str]]:
    """Return the generated parts of each document, by the names in its comments."""
    return {
        'README.md': {'table: classification': _markdown(_classification()), 'table: dense': _markdown(_dense())},
        'docs/architecture.md': {'figure: packages': package_figure(), 'figure: network': network_figure()},
    }


def _classification() -> Iterator[Sequence[str]]:
    yield 'weights', 'parameters', 'top-1 at 224x224', 'crop'
    for arch in ARCHS:
        names = [f'overlock_{arch}_in1k', f'overlock_{arch}_in1k_reparam']
        weights = WEIGHTS[names[0]]
        yield (
            ', '.join(_link(name) for name in names),
            f'{parameters(arch) / 1e6:.2f} M',
            f'{weights.metrics["top1"]:.1f}',
            str(weights.crop_pct),
        )


def _dense() -> Iterator[Sequence[str]]:
    yield 'weights', 'configuration', 'result'
    for name, weights in WEIGHTS.items():
        if weights.config:
            metrics = _RESULTS[weights.task][2]
            results = ', '.join(f'{metrics[key]} {value:.1f}' for key, value in weights.metrics.items())
            yield _link(name), f'[{weights.config}.py](configs/{weights.config}.py)', results


def _link(name: str) -> str:
    return f'[`{name}`]({WEIGHTS[name].url})'


def _markdown(rows: Iterator[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ['---'] * len(header), *body]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def fill_in(document: str, parts: dict[str, str]) -> str:
    """Put each part between the comments `<!-- NAME -->` and `<!-- end -->` of a Markdown document.

    Raises:
        ValueError: The document has no place, or more than one, for a part.
    """
    for name, part in parts.items():
        opening = f'<!-- {name} -->\n'
        new = (opening + part).replace('\\', r'\\')
        document, places = re.subn(rf'{opening}.*?(?=<!-- end -->)', new, document, flags=re.DOTALL)
        if places != 1:
            raise ValueError(f'expected one place for {name}, got {places}')
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; the exit code is 1 if something is stale')
    check = parser.parse_args().check
    contents = {ROOT / name: fill_in((ROOT / name).read_text(encoding='utf-8'), new) for name, new in parts().items()}
    index = yaml.safe_dump(model_index(), sort_keys=False, allow_unicode=True, width=120)
    contents[ROOT / 'model-index.yml'] = index
    stale = [
        path for path, content in contents.items() if not path.is_file() or path.read_text(encoding='utf-8') != content
    ]
    for path in stale:
        print(f'{path.relative_to(ROOT)} {"is stale" if check else "written"}')
        if not check:
            with whole_file(path) as file:
                file.write(contents[path].encode())
    return bool(stale and check)


if __name__ == '__main__':
    sys.exit(main())
