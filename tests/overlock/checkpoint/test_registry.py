"""The table of published weights: complete, with names, URLs and settings as they were published."""

import re

import pytest
import torch

from overlock import ARCHS, OverLoCKBackbone
from overlock.checkpoint import WEIGHTS, load_pretrained
from tests.testing import published_weights

# Those of MogaNet are in test_moganet_weights.py.
TABLE = {name: weights for name, weights in WEIGHTS.items() if weights.network == 'OverLoCK'}


def test_every_published_file_has_a_name():
    files = {weights.url.rpartition('/')[2]: name for name, weights in TABLE.items()}
    assert len(files) == len(TABLE) == 8 + 6 + 3
    assert {weights.url.rpartition('/')[0] for weights in TABLE.values()} == {
        'https://github.com/LMMMEng/OverLoCK/releases/download/v1'
    }
    assert files['overlock_s_in1k_224.pth'] == 'overlock_s_in1k'
    assert files['overlock_s_in1k_224_reparam.pth'] == 'overlock_s_in1k_reparam'
    assert files['maskrcnn1x_overlock_small_coco.pth'] == 'mask_rcnn_overlock_s_1x_coco'
    assert files['maskrcnn3x_overlock_tiny_coco.pth'] == 'mask_rcnn_overlock_t_3x_coco'
    assert files['upernet_overlock_base_ade20k.pth'] == 'upernet_overlock_b_ade20k'
    for name, weights in TABLE.items():
        assert weights.arch in ARCHS and f'overlock_{weights.arch}_' in name
        assert weights.form == ('merged' if name.endswith('_reparam') else 'training')
        assert re.match(
            {'classification': 'overlock_', 'detection': 'mask_rcnn_', 'segmentation': 'upernet_'}[weights.task], name
        )


def test_crops_and_results_are_the_published_ones():
    crops = {name: weights.crop_pct for name, weights in TABLE.items()}
    assert [crops[f'overlock_{arch}_in1k'] for arch in ARCHS] == [0.925, 0.95, 0.95, 0.975]
    assert [WEIGHTS[f'overlock_{arch}_in1k_reparam'].metrics['top1'] for arch in ARCHS] == [82.7, 84.2, 84.8, 85.1]
    assert WEIGHTS['mask_rcnn_overlock_b_3x_coco'].metrics == {'box_ap': 51.4, 'mask_ap': 45.3}
    assert WEIGHTS['upernet_overlock_t_ade20k'].metrics == {'miou': 50.3}


@pytest.mark.parametrize(
    ('name', 'kind', 'prefix'),
    [
        ('overlock_xt_in1k', 'cls', ''),
        pytest.param('mask_rcnn_overlock_t_1x_coco', 'det', 'backbone.', marks=pytest.mark.slow),
        pytest.param('upernet_overlock_t_ade20k', 'seg', 'backbone.', marks=pytest.mark.slow),
    ],
)
def test_weights_load_by_name(name, kind, prefix, shapes, tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    weights = published_weights(shapes[kind][WEIGHTS[name].arch])
    state = {f'{prefix}{key}': value for key, value in weights.items()}
    torch.save({'state_dict': state, 'meta': {'epoch': 12}}, tmp_path / WEIGHTS[name].url.rpartition('/')[2])
    model = OverLoCKBackbone(WEIGHTS[name].arch, overview_residual=kind != 'seg')
    report = load_pretrained(model, name)
    assert report.source == name and (not report.new or kind == 'cls')
    assert torch.equal(model.base_net.stem[0].conv.weight, weights['patch_embed1.0.weight'].float())
