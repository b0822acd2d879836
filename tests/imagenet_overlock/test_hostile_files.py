"""Every way to load a file with timm and in ImageNet training refuses crafted and damaged ones by one sentence."""

import pytest
import timm

from imagenet_overlock.train import train
from imagenet_overlock.validate import validate
from overlock.checkpoint import CheckpointError
from overlock.timm import TimmOverLoCK
from tests.imagenet_overlock import tiny
from tests.overlock.checkpoint import hostile
from tests.testing import randomise

FAULTS = [pytest.param(name, marks=[] if name in hostile.FEW else pytest.mark.slow) for name in hostile.REPRESENTATIVES]
WAYS = {
    'checkpoint_path': lambda path, *_: timm.create_model('overlock_tiny', checkpoint_path=path),
    'file of pretrained_cfg': lambda path, *_: timm.create_model(
        'overlock_xt', arch=tiny.ARCH, pretrained=True, pretrained_cfg_overlay={'file': path}
    ),
    '--initial-checkpoint': lambda path, data, recipe, out: train(recipe(initial_checkpoint=path), data, out),
    '--resume': lambda path, data, recipe, out: train(recipe(), data, out, resume=path),
    '--checkpoint': lambda path, data, *_: validate(data, 'overlock_tiny', path, img_size=32, workers=0),
    '--checkpoint without a model': lambda path, data, *_: validate(data, None, path, img_size=32, workers=0),
}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    weights = {classes: randomise(TimmOverLoCK(tiny.ARCH, num_classes=classes)).state_dict() for classes in (10, 1000)}
    return {
        classes: hostile.make(tmp_path_factory.mktemp('hostile'), dict(state), hostile.REPRESENTATIVES)
        for classes, state in weights.items()
    }


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('way', WAYS)
def test_every_way_refuses_the_file(way, fault, files, drawn, recipe, tmp_path, monkeypatch):
    if way.endswith('without a model') and fault in ('one NaN', 'integers', 'all without values'):
        return  # These are no checkpoints of training: the model is asked for.
    monkeypatch.chdir(tmp_path)
    path = files[1000 if 'c' == way[0] or 'file' in way else 10][fault]
    with pytest.raises(CheckpointError) as caught:
        WAYS[way](str(path), drawn, recipe, tmp_path / 'out')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 700
    assert not list(tmp_path.rglob(f'*{hostile.CANARY}'))
