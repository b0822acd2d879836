#!/usr/bin/env python
"""Measure the training pipelines of COCO, ADE20K and ImageNet on one core: images a second, split by transform.

The data sets come from the project's configurations, on the photographs of `--data`: `coco_tiny` and `ade_tiny`, in the
layouts of COCO and ADE20K. Times are those of the processor, in one process with one thread. The decoders of mmcv are
compared on the same files; one that gives other pixels gets no speed. The tables of docs/scaling.md come from the JSON.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.presets import is_beside
from benchmarks.record import latest, make_parser, table, write_result
from benchmarks.rounds import is_timed

CONFIGS = {
    'COCO, one scale': ('mask_rcnn_overlock_t_1x', 'coco_tiny'),
    'COCO, many scales': ('mask_rcnn_overlock_t_3x', 'coco_tiny'),
    'ADE20K': ('upernet_overlock_t_160k', 'ade_tiny'),
}
DECODERS = ('cv2', 'turbojpeg', 'pillow')
# Largest difference of a pixel from OpenCV's, of 255.
LIMIT = 2
# Results of `gpu.sh`: training steps of networks that take these pipelines.
STEPS = {
    'COCO, one scale': 'detector-mask_rcnn_overlock_xt_1x-train-2x3x800x1344-nvidia-*.json',
    'ImageNet': 'network-t-train-128x3x224x224-bf16-nvidia-*.json',
}


def timed(transform: Any, seconds: dict[str, float]) -> Any:
    """Return a transform that adds its seconds to those of its name; of a sequence or a choice, each part does."""
    parts = getattr(transform, 'transforms', None)
    if isinstance(parts, list):
        parts[:] = [timed(part, seconds) for part in parts]
        return transform

    def call(data: Any) -> Any:
        start = time.process_time()
        data = transform(data)
        seconds[type(transform).__name__] += time.process_time() - start
        return data

    return call


def build(config: str, root: Path) -> Any:
    """Return the training data set of a configuration, on another folder."""
    from mmengine.registry import DATASETS, DefaultScope

    from mmengine_overlock.config import load_config, set_data_root

    cfg = load_config(config)
    set_data_root(cfg, root)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        dataset.full_init()
    return dataset


def build_imagenet(photographs: Path, folder: Path) -> Any:
    """Return the training data set of the recipes on photographs, as one class; random erasing is done on the GPU."""
    import timm

    import overlock.timm  # noqa: F401  (registers)
    from imagenet_overlock.data import train_loader
    from imagenet_overlock.distributed import World
    from imagenet_overlock.folder import check_split
    from imagenet_overlock.recipe import Recipe

    (folder / 'photograph').symlink_to(photographs, target_is_directory=True)
    model = timm.create_model('overlock_xt')
    recipe = Recipe(workers=0, batch_size=2)
    return train_loader(recipe, check_split(folder), World(torch.device('cpu')), model).loader.dataset


def measure(name: str, dataset: Any, rounds: int) -> dict[str, Any]:
    """Return a row: seconds of an image in each round, altogether and by transform."""
    seconds: dict[str, float] = defaultdict(float)
    timed(dataset.transform if hasattr(dataset, 'transform') else dataset.pipeline, seconds)
    row: dict[str, Any] = {'name': name, 'images': len(dataset), 'times': [], 'transforms': defaultdict(list)}
    for turn in range(rounds + 1):
        seconds.clear()
        random.seed(turn), np.random.seed(turn), torch.manual_seed(turn)
        start = time.process_time()
        for index in range(len(dataset)):
            dataset[index]
        total = time.process_time() - start
        if turn == 0:  # the first reads files into memory
            continue
        row['times'].append(total / len(dataset))
        # timm's data set opens and decodes outside of its transforms.
        for part, spent in {**seconds, 'data set': total - sum(seconds.values())}.items():
            row['transforms'][part].append(spent / len(dataset))
    return row | {'modes': {}}


def measure_decoders(files: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each decoder of mmcv, in turns."""
    import mmcv

    contents = [path.read_bytes() for path in files]
    rows: list[dict[str, Any]] = [{'name': f'decode, {name}', 'decoder': name, 'times': []} for name in DECODERS]
    for row in rows:
        try:
            mmcv.use_backend(row['decoder'])
        except Exception as error:  # the package may be there without its library
            row['error'] = str(error).partition('\n')[0]
            continue
        pairs = ((mmcv.imfrombytes(x, backend='cv2'), mmcv.imfrombytes(x, backend=row['decoder'])) for x in contents)
        found = max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs)
        row['check'] = {'passed': found <= LIMIT, 'deviation': {'pixel': found}, 'limit': {'pixel': LIMIT}}
        row |= {'modes': {}} if found <= LIMIT else {}
    for _ in range(rounds):
        for row in filter(is_timed, rows):
            start = time.process_time()
            for content in contents:
                mmcv.imfrombytes(content, backend=row['decoder'])
            row['times'].append((time.process_time() - start) / len(contents))
    return rows


def parts_of(row: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of an image by kind of transform."""
    kinds: dict[str, float] = dict.fromkeys(('decode', 'annotations', 'resize', 'rest'), 0.0)
    for name, times in row['transforms'].items():
        kind = 'decode' if name == 'LoadImageFromFile' or name == 'data set' and row['name'] == 'ImageNet' else 'rest'
        kind = 'annotations' if name == 'LoadAnnotations' else 'resize' if 'Resize' in name else kind
        kinds[kind] += statistics.median(times)
    return kinds


def tables(rows: Sequence[dict[str, Any]] | None = None) -> dict[str, str]:
    """Return the tables of docs/scaling.md by their names there, of the newest result if no rows are given."""
    if rows is None:
        rows = [row for record in latest('loading-*.json') for row in record['rows']]
    timings = ['images a second and core', 'decode', 'annotations', 'resize', 'rest']
    pipelines, decoders = [], []
    for row in filter(is_timed, rows):
        rate = 1 / statistics.median(row['times'])
        if 'decoder' in row:
            decoders.append([row['decoder'], f'{rate:.0f}', f'{row["check"]["deviation"]["pixel"]} of 255'])
        else:
            parts = [f'{seconds * 1e3:.1f} ms' for seconds in parts_of(row).values()]
            pipelines.append([row['name'], f'{rate:.0f}', *parts, *eaten(row['name'], rate)])
    return {
        'table: loading': table(['pipeline', *timings, 'a GPU takes', 'cores'], pipelines),
        'table: decoders': table(['decoder of mmcv', timings[0], 'largest difference from cv2'], decoders),
    }


def eaten(name: str, rate: float) -> tuple[str, str]:
    """Return what a GPU was measured to train with, images a second, and how many cores of a rate load that."""
    for record in latest(STEPS.get(name, 'none')):
        rows = [row for row in record['rows'] if is_timed(row) and not is_beside(row['name'])]
        taken = max(row['modes']['train']['images_per_second'] for row in rows)
        return f'{taken:.0f} ({record["machine"]["gpu"]})', f'{taken / rate:.1f}'
    return 'not measured', ''


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(device='cpu', threads=1)
    data = os.environ.get('OVERLOCK_DATA')
    parser.add_argument('--data', type=Path, default=data, required=not data, help='default: OVERLOCK_DATA')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    photographs = args.data.resolve() / 'coco_tiny' / 'train2017'
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Any]] = {
            name: partial(build, config, args.data / part) for name, (config, part) in CONFIGS.items()
        }
        makers['ImageNet'] = partial(build_imagenet, photographs, Path(folder))
        for name, make in makers.items():
            rows.append(measure(name, make(), args.rounds))
            print(name)
            for part, times in rows[-1]['transforms'].items():
                print(f'  {part}: {statistics.median(times) * 1e3:.2f} ms')
    rows += measure_decoders(sorted(photographs.glob('*.jpg')), args.rounds)
    print(*tables(rows).values(), sep='\n')
    write_result('loading', args, rows)
    return 0


if __name__ == '__main__':
    sys.exit(main())
