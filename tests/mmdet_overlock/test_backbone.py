"""The backbone in mmdet's registry."""

import subprocess
import sys

import pytest
import torch

import mmdet_overlock
from mmdet.registry import MODELS
from mmengine_overlock import backbone
from overlock import OverLoCK
from overlock.checkpoint import CheckpointError
from tests.overlock.test_model import TINY


def build(**kwargs):
    return MODELS.build(dict(type='OverLoCK', arch=TINY, **kwargs))


def test_import_alone_registers_the_backbone_in_a_fresh_interpreter(tmp_path):
    code = ('import mmdet_overlock; from mmdet.registry import MODELS; '
            'print(MODELS.build(dict(type="OverLoCK", arch="xt")).overview_residual)')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split()[-1:] == ['True'], result.stderr


def test_custom_imports_of_a_configuration_anywhere_register_it(tmp_path):
    (tmp_path / 'config.py').write_text(
        "custom_imports = dict(imports=['mmdet_overlock'], allow_failed_imports=False)\n"
        "default_scope = 'mmdet'\nmodel = dict(type='OverLoCK', arch='xt', out_indices=(3,))\n")
    code = ('from mmengine.config import Config; from mmengine.registry import MODELS, init_default_scope; '
            f'cfg = Config.fromfile({str(tmp_path / "config.py")!r}); init_default_scope(cfg.default_scope); '
            'print(type(MODELS.build(cfg.model)).__module__)')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.split()[-1:] == ['mmdet_overlock.backbone'], result.stderr


def test_pretrained_weights_are_loaded_and_told_once(tmp_path, monkeypatch):
    classifier = OverLoCK(TINY)
    torch.save({'state_dict': classifier.state_dict()}, tmp_path / 'imagenet.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'imagenet.pth'))
    model = build(init_cfg=init_cfg)
    said = []
    monkeypatch.setattr(backbone, 'print_log', lambda message, *args: said.append(message))
    model.init_weights()
    assert len(said) == 1 and 'new in the model' in said[0] and 'dropped from the file' in said[0]
    assert model.init_cfg == init_cfg
    assert torch.equal(model.base_net.stem[0].conv.weight, classifier.base_net.stem[0].conv.weight)


def test_weights_of_another_variant_are_an_error(tmp_path):
    torch.save(OverLoCK({**TINY, 'embed_dims': (16, 16, 16, 32)}).state_dict(), tmp_path / 'other.pth')
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth')))
    with pytest.raises(CheckpointError, match='not for this model'):
        model.init_weights()


def test_wrong_version_is_one_clear_sentence(monkeypatch):
    from mmengine_overlock.versions import require
    monkeypatch.setattr('mmdet.version.__version__', '99.0.0')
    with pytest.raises(ImportError, match='needs mmdet >= .* but 99.0.0 is installed'):
        require(mmdet_overlock.__name__, mmdet=('1.0', '4.0'))
    with pytest.raises(ImportError, match='needs nowhere >= 1.0 and < 2.0, which does not import here'):
        require(mmdet_overlock.__name__, nowhere=('1.0', '2.0'))
