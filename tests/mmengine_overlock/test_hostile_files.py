"""Every way to load a file with mmengine refuses crafted and damaged ones by one sentence, and runs no code."""

import subprocess
import sys

import mmdet.models  # noqa: F401
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint

import mmdet_overlock  # noqa: F401
from mmengine_overlock.run import test as run_test
from mmengine_overlock.run import train
from overlock import OverLoCKBackbone
from overlock.checkpoint import CheckpointError
from overlock.checkpoint.convert import convert_file
from tests.overlock.checkpoint import hostile
from tests.testing import ROOT, TINY, randomise
from tests.toy import ToyBackbone, ToyModel

FAULTS = [pytest.param(name, marks=[] if name in hostile.FEW else pytest.mark.slow) for name in hostile.REPRESENTATIVES]
NECK = dict(type='FPN', in_channels=[4, 4], out_channels=4, num_outs=2)


def neck(**kwargs):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(**NECK, **kwargs))


NETWORKS = {
    'toy': lambda: ToyModel(dict(type='ToyBackbone')),
    'toy backbone': ToyBackbone,
    'backbone': lambda: OverLoCKBackbone(TINY),
    'neck': neck,
}


def pretrained(path):
    return dict(type='Pretrained', checkpoint=str(path))


def backbone(**kwargs):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(type='OverLoCK', arch=TINY, **kwargs))


# By the way: the network whose weights the files have, and what loads one.
WAYS = {
    'load_from': ('toy', lambda path, config: train(config(f'load_from = {str(path)!r}'))),
    '--resume': ('toy', lambda path, config: train(config(), resume=str(path))),
    'test.py': ('toy', lambda path, config: run_test(config(), str(path))),
    '--weights': ('toy backbone', lambda path, config: train(config(), weights=str(path))),
    'init_cfg of the backbone': (
        'backbone',
        lambda path, config: backbone(init_cfg=pretrained(path)).init_weights(),
    ),
    'init_cfg of the neck': ('neck', lambda path, config: neck(init_cfg=pretrained(path)).init_weights()),
    'load_checkpoint': ('neck', lambda path, config: load_checkpoint(neck(), str(path))),
    'convert': ('backbone', lambda path, config: convert_file(path, path.with_name('out.pth'))),
}  # fmt: skip


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """By network and fault, a file."""
    made = {}
    for name, build in NETWORKS.items():
        folder = tmp_path_factory.mktemp('hostile')
        made[name] = hostile.make(folder, dict(randomise(build()).state_dict()), hostile.REPRESENTATIVES)
    return made


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('way', WAYS)
def test_every_way_refuses_the_file(way, fault, files, write_toy, tmp_path):
    network, load = WAYS[way]
    with pytest.raises(CheckpointError) as caught:
        load(files[network][fault], write_toy)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 700
    assert not list(tmp_path.rglob(f'*{hostile.CANARY}'))


def test_configuration_inside_a_checkpoint_does_not_run_on_resume(write_toy, tmp_path):
    runner = train(write_toy(), work_dir=tmp_path / 'a')
    content = torch.load(tmp_path / 'a' / 'epoch_2.pth', weights_only=False)
    content['meta']['config'] = f'import os\nos.mkdir({str(tmp_path / hostile.CANARY)!r})'
    torch.save(content, tmp_path / 'crafted.pth')
    resumed = train(write_toy(), work_dir=tmp_path / 'b', resume=str(tmp_path / 'crafted.pth'))
    assert resumed.iter == runner.iter and not (tmp_path / hostile.CANARY).exists()


@pytest.mark.parametrize('package', ['mmdet_overlock', 'mmseg_overlock'])
def test_import_alone_makes_the_loading_of_mmengine_safe(package, tmp_path, write_toy):
    train(write_toy(), work_dir=tmp_path / 'a')
    torch.save(dict(state_dict=dict(extra=hostile.Call(exec, 'import os; os.mkdir("ran")'))), tmp_path / 'crafted.pth')
    code = f"""
import os
os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'
import {package}
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn
content = CheckpointLoader.load_checkpoint('a/epoch_2.pth')
print(type(content['message_hub']['log_scalars']['train/loss']).__name__)
try:
    load_checkpoint(nn.Linear(1, 1), 'crafted.pth')
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'HistoryBuffer\n' in result.stdout
    assert 'crafted.pth asks for the Python object builtins.exec' in result.stdout
    assert not (tmp_path / 'ran').exists()


@pytest.mark.slow
def test_init_detector_of_mmdet_takes_our_checkpoints(tmp_path):
    from mmdet.apis import init_detector
    from mmengine.config import Config

    config = Config.fromfile(ROOT / 'configs' / 'mask_rcnn_overlock_xt_1x.py')
    config.model.backbone.update(arch=TINY, init_cfg=None)
    config.model.neck.in_channels = [8, 16, 24, 40]
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(config.model)
    content = dict(
        state_dict=detector.state_dict(),
        meta=dict(dataset_meta=dict(classes=('a', 'b'), palette=np.zeros((2, 3), int))),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1]))),
    )
    torch.save(content, tmp_path / 'w.pth')
    loaded = init_detector(config, str(tmp_path / 'w.pth'), device='cpu')
    assert loaded.dataset_meta['classes'] == ('a', 'b')
    assert all(torch.equal(value, detector.state_dict()[name]) for name, value in loaded.state_dict().items())
