"""The demonstration as a whole, shortened, and its configurations."""

import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from demo import detector
from demo.detector import draw
from demo.drawing import SCENE_CLASSES as CLASSES
from mmengine_overlock.config import set_data_root
from overlock.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DETECTOR = ROOT / 'configs/demo/cascade_overlock_xt_shapes.py'
SHORT = {
    'train_cfg.max_iters': 2,
    'train_cfg.val_interval': 2,
    'train_dataloader.batch_size': 2,
    'default_hooks.logger.interval': 1,
}


def test_the_configuration_names_the_drawn_classes_and_starts_from_random_weights():
    cfg = Config.fromfile(DETECTOR)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert tuple(loader.dataset.metainfo.classes) == CLASSES
        assert len(loader.dataset.metainfo.palette) == len(CLASSES)
    assert cfg.model.backbone.arch == 'xt'
    assert cfg.model.backbone.init_cfg is None and cfg.load_from is None


def test_detector_configuration_has_heads_for_the_drawn_classes():
    head = Config.fromfile(DETECTOR).model.roi_head
    assert [box_head.num_classes for box_head in head.bbox_head] == [len(CLASSES)] * 3
    assert head.mask_head.num_classes == len(CLASSES)


def test_data_sets_of_the_configuration_read_the_drawn_data(tmp_path):
    cfg = Config.fromfile(DETECTOR)
    set_data_root(cfg, draw(tmp_path / 'data', train=6, val=5, size=64) / 'coco')
    register_all = import_module(f'{cfg.default_scope}.utils').register_all_modules
    register_all(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for loader, count in ((cfg.train_dataloader, 6), (cfg.val_dataloader, 5)):
            dataset = DATASETS.build(loader.dataset)
            assert len(dataset) == count
            assert dataset[0]['inputs'].shape[0] == 3


def test_files_of_others_are_not_cleared(tmp_path):
    mine = tmp_path / 'run' / 'mine.txt'
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(UserError, match='--work-dir'):
        detector.run_demo(DETECTOR, tmp_path)
    assert mine.is_file()


@pytest.mark.slow
def test_a_demonstration_leaves_its_files_and_a_second_one_mixes_nothing_in(tmp_path, monkeypatch):
    monkeypatch.setattr(detector, 'draw', partial(draw, train=5, val=5, size=64))
    for _ in range(2):
        outcome = detector.run_demo(DETECTOR, tmp_path, SHORT)
        assert all(path.stat().st_size for path in outcome.files.values())
        assert 0 <= outcome.score <= 100
        assert {path.name for path in tmp_path.iterdir()} == {'data', 'run'}
        assert len(list((tmp_path / 'run').glob('*/vis_data/scalars.json'))) == 1


@pytest.mark.slow
def test_the_tool_draws_the_data_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/demo.py', '--draw-only', '--work-dir', tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f'data set: {tmp_path / "data"}\n'
    assert len(list((tmp_path / 'data/coco/train2017').glob('*.jpg'))) > 100
