"""The wheel works without a checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.mmengine_overlock.data_sets import CLASSES, write_coco
from tests.testing import ROOT

SMALL = [f'{split}_dataloader.dataset.metainfo.classes={",".join(CLASSES)}' for split in ('train', 'val', 'test')]
SMALL += [f'{split}_dataloader.dataset.pipeline.1.scale=(96,64)' for split in ('val', 'test')]
SMALL += [f'model.roi_head.{head}_head.num_classes={len(CLASSES)}' for head in ('bbox', 'mask')]
SMALL += ['train_dataloader.dataset.pipeline.2.scale=(96,64)', 'train_dataloader.dataset.filter_cfg.min_size=1']
SMALL += ['model.backbone.init_cfg=None', 'train_cfg.max_epochs=1', 'model.test_cfg.rcnn.score_thr=0.0']


@pytest.mark.slow
def test_a_wheel_trains_predicts_and_exports_by_name_from_any_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()

    def run(*arguments, cwd=elsewhere):
        result = subprocess.run(map(str, arguments), capture_output=True, text=True, cwd=cwd, env=environment)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    source, home = tmp_path / 'source', tmp_path / 'venv'
    run('git', 'clone', '-q', ROOT, source)
    pip = (sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check')
    run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, '.', cwd=source)
    shutil.rmtree(source)
    (wheel,) = tmp_path.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    # Where OpenMMLab's mim looks.
    for name in ('configs/cascade_overlock_s_3x.py', 'configs/_base_/det_runtime.py', 'tools/train.py'):
        assert f'overlock/.mim/{name}' in names
    assert 'overlock/.mim/model-index.yml' in names

    venv.create(home, symlinks=True)
    (site,) = home.glob('lib/python*/site-packages')
    # The packages of this environment, but for an editable install of this one, whose hook is not run from there.
    (site / 'others.pth').write_text(sysconfig.get_paths()['purelib'])
    run(*pip, '--python', home / 'bin/python', 'install', '--no-deps', wheel)
    overlock = home / 'bin/overlock'
    assert run(overlock, 'configs', 'upernet_overlock_xt_160k').startswith(str(site / 'overlock/.mim'))
    assert 'cascade_overlock_s_3x' in run(overlock, 'configs')

    data = elsewhere / 'data'
    data.mkdir()
    write_coco(data)
    for split in ('train', 'val'):
        shutil.copy(data / 'annotations/a.json', data / f'annotations/instances_{split}2017.json')
        shutil.copytree(data / 'train', data / f'{split}2017')
    name = 'mask_rcnn_overlock_xt_1x'
    run(overlock, 'train', name, '--data-root', 'data', '--work-dir', 'work', '--cfg-options', *SMALL)
    run(overlock, 'predict', 'data/val2017', '--checkpoint', 'work/epoch_1.pth', '--out', 'out', '--score', 0)
    results = json.loads((elsewhere / 'out/predictions.json').read_text())
    assert results and {result['category_name'] for result in results} <= {*CLASSES}
    run(
        *(overlock, 'export', f'work/{name}.py', 'work/epoch_1.pth', '--out', 'backbone.onnx'),
        *('--part', 'backbone', '--size', '64x64'),
    )
    assert (elsewhere / 'backbone.onnx').stat().st_size > 1e7
