"""The backbone in the registries of mmdet and mmseg."""

import importlib
import subprocess
import sys

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import distributed

from mmengine_overlock import backbone
from overlock import MogaNet, OverLoCK
from overlock.checkpoint import CheckpointError
from overlock.utils.errors import UserError
from tests.testing import MOGANET_TINY, TINY, randomise

TOOLBOXES = ['mmdet', 'mmseg']

# Each toolbox by the custom_imports of a configuration alone.
REGISTERED = """
from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS, MODELS, OPTIM_WRAPPERS, DefaultScope

for toolbox in ('mmdet', 'mmseg'):
    cfg = Config.fromfile(f'{toolbox}_config.py')
    with DefaultScope.overwrite_default_scope(toolbox):
        model = MODELS.build(cfg.model)
    print(type(model).__module__, model.overview_residual)
# A saved configuration may name these too.
assert OPTIM_WRAPPERS.get('BFloat16OptimWrapper') and HOOKS.get('BoxesOnlyHook') and METRICS.get('DumpSegResults')
"""


@pytest.fixture(params=TOOLBOXES)
def build(request):
    """Build the backbone by the registry of each toolbox."""
    importlib.import_module(f'{request.param}_overlock')
    models = importlib.import_module(f'{request.param}.registry').MODELS
    # An earlier run in this process may have left a scope of its own.
    with DefaultScope.overwrite_default_scope(request.param):
        yield lambda **kwargs: models.build(dict(type='OverLoCK', arch=TINY, **kwargs))


def test_custom_imports_of_a_configuration_anywhere_register_each_form_in_a_fresh_interpreter(tmp_path):
    for toolbox in TOOLBOXES:
        (tmp_path / f'{toolbox}_config.py').write_text(
            f"custom_imports = dict(imports=['{toolbox}_overlock'], allow_failed_imports=False)\n"
            f"model = dict(type='OverLoCK', arch={TINY})\n"
        )
    result = subprocess.run([sys.executable, '-c', REGISTERED], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-4:] == ['mmdet_overlock.backbone', 'True', 'mmseg_overlock.backbone', 'False']


def test_pretrained_weights_are_loaded_and_told_once(build, tmp_path, monkeypatch):
    classifier = OverLoCK(TINY)
    torch.save({'state_dict': classifier.state_dict()}, tmp_path / 'imagenet.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'imagenet.pth'))
    model, said = build(init_cfg=init_cfg), []
    monkeypatch.setattr(backbone, 'tell', lambda message, *args: said.append(message))
    model.init_weights()
    model.init_weights()
    assert len(said) == 1 and 'new in the model' in said[0] and 'dropped from the file' in said[0]
    assert model.init_cfg == init_cfg
    assert torch.equal(model.base_net.stem[0].conv.weight, classifier.base_net.stem[0].conv.weight)


def test_pretrained_weights_load_in_a_distributed_run(build, tmp_path):
    classifier = OverLoCK(TINY)
    torch.save(classifier.state_dict(), tmp_path / 'imagenet.pth')
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'imagenet.pth')))
    store = distributed.FileStore(str(tmp_path / 'store'), 1)
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        model.init_weights()
    finally:
        distributed.destroy_process_group()
    assert torch.equal(model.base_net.stem[0].conv.weight, classifier.base_net.stem[0].conv.weight)


def test_weights_of_another_variant_are_an_error(build, tmp_path):
    torch.save(OverLoCK({**TINY, 'embed_dims': (16, 16, 16, 32)}).state_dict(), tmp_path / 'other.pth')
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth')))
    with pytest.raises(CheckpointError, match='not for this model'):
        model.init_weights()


def test_other_initialisation_is_left_to_mmengine(build):
    model = build(init_cfg=dict(type='Constant', layer='Conv2d', val=0.5))
    model.init_weights()
    assert (model.base_net.stem[0].conv.weight == 0.5).all()


@pytest.mark.parametrize(
    'init_cfg',
    [dict(type='Pretrained'), dict(type='Pretrained', checkpoint=''), dict(checkpoint='a.pth'), 'a.pth'],
    ids=str,
)
def test_init_cfg_of_another_form_is_one_sentence(build, init_cfg):
    with pytest.raises(UserError, match=r"init_cfg is a dict with a type, .* 'Pretrained' has a checkpoint .*; got "):
        build(init_cfg=init_cfg).init_weights()


@pytest.mark.parametrize('toolbox', TOOLBOXES)
def test_moganet_is_registered_with_both_and_takes_pretrained_weights(toolbox, tmp_path, monkeypatch):
    classifier, said = randomise(MogaNet(MOGANET_TINY)), []
    torch.save({'state_dict': classifier.state_dict()}, tmp_path / 'imagenet.pth.tar')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'imagenet.pth.tar'))
    importlib.import_module(f'{toolbox}_overlock')
    models = importlib.import_module(f'{toolbox}.registry').MODELS
    with DefaultScope.overwrite_default_scope(toolbox):
        model = models.build(dict(type='MogaNet', arch=MOGANET_TINY, out_indices=(1, 2), init_cfg=init_cfg))
    monkeypatch.setattr(backbone, 'tell', lambda message, *args: said.append(message))
    model.init_weights()
    assert len(said) == 1 and 'dropped from the file' in said[0] and 'head' in said[0]
    state = classifier.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
