"""The backbone in the registries of mmdet and mmseg."""

import importlib
import subprocess
import sys

import pytest
import torch
from mmengine.registry import DefaultScope

from mmengine_overlock import backbone
from mmengine_overlock.versions import require
from overlock import OverLoCK
from overlock.checkpoint import CheckpointError
from tests.overlock.test_model import TINY

TOOLBOXES = ['mmdet', 'mmseg']


@pytest.fixture(params=TOOLBOXES)
def build(request):
    """Builds the backbone by the registry of each toolbox."""
    importlib.import_module(f'{request.param}_overlock')
    models = importlib.import_module(f'{request.param}.registry').MODELS
    # An earlier run in this process may have left a scope of its own.
    with DefaultScope.overwrite_default_scope(request.param):
        yield lambda **kwargs: models.build(dict(type='OverLoCK', arch=TINY, **kwargs))


def last_word(code, cwd):
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-1]


@pytest.mark.parametrize(('toolbox', 'overview_residual'), [('mmdet', 'True'), ('mmseg', 'False')])
def test_import_alone_registers_each_form_in_a_fresh_interpreter(toolbox, overview_residual, tmp_path):
    code = (
        f'import {toolbox}_overlock; from {toolbox}.registry import MODELS; '
        'print(MODELS.build(dict(type="OverLoCK", arch="xt")).overview_residual)'
    )
    assert last_word(code, tmp_path) == overview_residual


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_custom_imports_of_a_configuration_anywhere_register_it(toolbox, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        f"custom_imports = dict(imports=['{toolbox}_overlock'], allow_failed_imports=False)\n"
        f"default_scope = '{toolbox}'\nmodel = dict(type='OverLoCK', arch='xt', out_indices=(3,))\n"
    )
    code = (
        'from mmengine.config import Config; from mmengine.registry import MODELS, init_default_scope; '
        f'cfg = Config.fromfile({str(config)!r}); init_default_scope(cfg.default_scope); '
        'print(type(MODELS.build(cfg.model)).__module__)'
    )
    assert last_word(code, tmp_path) == f'{toolbox}_overlock.backbone'


def test_pretrained_weights_are_loaded_and_told_once(build, tmp_path, monkeypatch):
    classifier = OverLoCK(TINY)
    torch.save({'state_dict': classifier.state_dict()}, tmp_path / 'imagenet.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'imagenet.pth'))
    model, said = build(init_cfg=init_cfg), []
    monkeypatch.setattr(backbone, 'print_log', lambda message, *args: said.append(message))
    model.init_weights()
    model.init_weights()
    assert len(said) == 1 and 'new in the model' in said[0] and 'dropped from the file' in said[0]
    assert model.init_cfg == init_cfg
    assert torch.equal(model.base_net.stem[0].conv.weight, classifier.base_net.stem[0].conv.weight)


def test_pretrained_weights_load_in_a_distributed_run(tmp_path):
    torch.save(OverLoCK(TINY).state_dict(), tmp_path / 'imagenet.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'imagenet.pth'))
    code = (
        'import torch, logging; from mmdet_overlock import OverLoCK; '
        f'store = torch.distributed.FileStore({str(tmp_path / "store")!r}, 1); '
        'torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1); '
        f'model = OverLoCK({TINY}, init_cfg={init_cfg}); logging.disable(); model.init_weights(); '
        'stem = model.base_net.stem[0].conv.weight; '
        f'given = torch.load({init_cfg["checkpoint"]!r})["base_net.stem.0.conv.weight"]; '
        'print(torch.equal(stem, given))'
    )
    assert last_word(code, tmp_path) == 'True'


def test_weights_of_another_variant_are_an_error(build, tmp_path):
    torch.save(OverLoCK({**TINY, 'embed_dims': (16, 16, 16, 32)}).state_dict(), tmp_path / 'other.pth')
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth')))
    with pytest.raises(CheckpointError, match='not for this model'):
        model.init_weights()


def test_other_initialisation_is_left_to_mmengine(build):
    model = build(init_cfg=dict(type='Constant', layer='Conv2d', val=0.5))
    model.init_weights()
    assert (model.base_net.stem[0].conv.weight == 0.5).all()


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_wrong_or_missing_version_is_one_clear_sentence(toolbox, monkeypatch):
    monkeypatch.setattr(f'{toolbox}.version.__version__', '99.0.0')
    with pytest.raises(ImportError, match=f'needs {toolbox} >= 1.0 and < 4.0, but 99.0.0 is installed'):
        require(f'{toolbox}_overlock', **{toolbox: ('1.0', '4.0')})
    with pytest.raises(ImportError, match='needs nowhere >= 1.0 and < 2.0, which does not import here'):
        require(f'{toolbox}_overlock', nowhere=('1.0', '2.0'))
