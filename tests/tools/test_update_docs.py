"""Documents agree with the registry of published weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from overlock import MogaNet
from overlock.checkpoint import WEIGHTS
from tests.testing import published_shapes
from tools.update_docs import (
    _PAPER_MOGANET,
    complexity,
    count_weights,
    fill_in,
    model_name,
    network_figure,
    package_figure,
    paper_table,
    parameters,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_documents_are_those_of_the_registry(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'update_docs.py', '--check'], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, ''), result.stdout + result.stderr


def test_index_lists_every_file_with_its_result_and_configuration():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    models = {model['Name']: model for model in index['Models']}
    assert list(models) == list(WEIGHTS)
    assert models['mask_rcnn_overlock_s_3x_coco']['Results'][0]['Metrics'] == {'box AP': 51.0, 'mask AP': 45.0}
    for model in models.values():
        assert model['Weights'].startswith('https://')
        if 'Config' in model:
            assert (ROOT / model['Config']).is_file()


def test_parameters_are_those_of_the_published_state_dicts():
    shapes = published_shapes()
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    for kind, form in (('cls', 'training'), ('cls_reparam', 'merged')):
        total = 0
        for name, shape in shapes[kind]['xt'].items():
            size = 1
            for length in shape:
                size *= length
            total += 0 if name.endswith(buffers) else size
        assert parameters('xt', form) == total


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    ['overlock_xt_in1k_reparam', 'mask_rcnn_overlock_t_1x_coco', 'upernet_overlock_t_ade20k', 'fpn_moganet_xt_ade20k'],
)
def test_recorded_counts_are_those_of_a_run(name):
    assert complexity()[model_name(WEIGHTS[name])] == count_weights(WEIGHTS[name])


def test_multiply_adds_of_the_paper_come_out_to_the_digit():
    rows = {row.split(' | ')[0]: row.split(' | ')[1:] for row in paper_table().strip().splitlines()}
    reported = [float(cell.rstrip(' |')) for cell in rows['| paper-reported']]
    assert [round(float(cell.rstrip(' |')), 1) for cell in rows['| sum']] == reported == [2.6, 5.5, 9.7, 16.7]


def test_multiply_adds_of_the_paper_on_moganet_come_out_with_biases():
    for (arch, size), (_, reported) in _PAPER_MOGANET.items():
        added = []
        with torch.device('meta'):
            model = MogaNet(arch).eval()
            for layer in model.modules():
                if getattr(layer, 'bias', None) is not None and isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.register_forward_hook(lambda _, args, out, added=added: added.append(out.numel()))
            model(torch.zeros(1, 3, size, size))
        counted = complexity()[f'MogaNet-{arch.upper()}, training form, {size}x{size}']['multiply_adds'] + sum(added)
        # Half of the last digit that is reported; for XL it has 34.5, where this gives 34.55.
        assert counted / 1e9 == pytest.approx(reported, abs={'l': 0.05, 'xl': 0.055}.get(arch, 0.005))


def test_parts_replace_what_stands_between_the_comments():
    document = 'a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\nc\n'
    filled = fill_in(document, {'table: x': '| 1 |\n', 'table: y': '| 2 |\n', 'table: z': ''})
    assert filled == 'a\n<!-- table: x -->\n| 1 |\n<!-- end -->\nb\n<!-- table: y -->\n| 2 |\n<!-- end -->\nc\n'


def test_figure_shows_only_arrows_that_point_down():
    figure = package_figure()
    assert 'overlock_checkpoint --> overlock_models' in figure
    assert 'overlock_models --> overlock_checkpoint' not in figure


def test_figure_of_the_network_has_the_shapes_of_a_run():
    figure = network_figure(size=64)
    assert 'focus_net_stage4["focus_net.stage4<br>336x2x2 + 84x2x2"]' in figure
    assert 'output_3["output 3<br>420x2x2"]' in figure
    assert '<br>"' not in figure
