"""The command lines that convert weight files."""

import os
from pathlib import Path

import pytest
import torch

from overlock import OverLoCK, OverLoCKBackbone
from overlock.checkpoint import load, to_published
from tests.testing import TINY


@pytest.fixture
def run(monkeypatch, tmp_path, run_tool):
    """`run_tool` in a folder with files to convert."""
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': to_published(OverLoCK(TINY).state_dict())}, 'classifier.pth')
    backbone = {f'backbone.{name}': value for name, value in OverLoCKBackbone(TINY).state_dict().items()}
    torch.save({'state_dict': {**backbone, 'neck.weight': torch.ones(2)}, 'meta': {}}, 'detector.pth')
    torch.save({'state_dict': {'conv1.weight': torch.ones(1)}}, 'resnet.pth')
    return run_tool


def test_a_table_and_how_the_file_was_verified_are_printed(run):
    code, out, errors = run('convert_checkpoint', 'classifier.pth', 'out.safetensors')
    assert (code, errors) == (0, '')
    lines = out.split('\n')
    assert lines[0].split() == ['part', 'kept', 'renamed', 'folded', 'dropped', 'added']
    total = len(load('classifier.pth'))
    assert lines[-3].split() == ['all', '0', str(total), '0', '0', '0']
    assert lines[-2] == (
        f'verified: {total} tensors read back bit for bit, loaded strictly into OverLoCK (an arch of '
        'its own, training form)'
    )


def test_verbose_tells_of_every_tensor(run):
    code, out, _ = run('convert_checkpoint', 'detector.pth', 'out.pth', '--backbone', '--merge', '--verbose')
    assert code == 0
    lines = out.split('\n')
    assert 'renamed  backbone.base_net.stem.0.conv.weight -> base_net.stem.0.conv.weight' in lines
    assert 'dropped  neck.weight -> -' in lines
    assert 'folded   backbone.base_net.stage1.0.dilated.bn.weight -> -' in lines
    assert 'outputs on a random image within' in lines[-2]


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (('absent.pth', 'out.pth'), 'The weight file absent.pth does not exist'),
        (('classifier.pth', 'out.onnx'), 'the output must be a file that ends in .pth or .safetensors, got out.onnx'),
        (
            ('classifier.pth', './classifier.pth'),
            'the output classifier.pth is the file that is converted; give another',
        ),
        (
            ('resnet.pth', 'out.pth'),
            'resnet.pth holds no OverLoCK or MogaNet: expected an entry base_net.stem.0.conv.weight, ',
        ),
        (('classifier.pth', 'out.pth', '--deploy', '--names', 'published'), 'classifier.pth has the folded form'),
        (('classifier.pth', 'out.pth', '--backbone'), 'classifier.pth is of a classifier, expected a detector'),
        (('classifier.pth', 'out.pth', '--ema'), 'classifier.pth holds no running average of weights'),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(arguments, sentence, run):
    before = sorted(os.listdir())
    code, out, errors = run('convert_checkpoint', *arguments)
    assert (code, out) == (2, '')
    assert errors.startswith(sentence) and errors.count('\n') == 1
    assert sorted(os.listdir()) == before


def test_deploy_and_merge_exclude_each_other(run):
    code, _, errors = run('convert_checkpoint', 'classifier.pth', 'out.pth', '--deploy', '--merge')
    assert code == 2 and 'not allowed with argument' in errors


@pytest.mark.slow
def test_tool_runs_from_any_folder(run, start_tool):
    result = start_tool('convert_checkpoint.py', 'detector.pth', 'out.pth', '--deploy')
    assert (result.returncode, result.stderr) == (0, '')
    assert torch.load('out.pth', weights_only=True)['state_dict']['neck.weight'].tolist() == [1, 1]


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (('absent.py', 'detector.pth', 'out.pth'), 'The configuration absent.py does not exist; '),
        (('config.py', 'absent.pth', 'out.pth'), 'The weight file absent.pth does not exist'),
        (
            ('config.py', 'detector.pth', 'out.safetensors'),
            'the output must be a file that ends in .pth, got out.safetens',
        ),
        (
            ('config.py', 'detector.pth', 'config.pth'),
            'config.py would be overwritten by the new file of this name; give ',
        ),
        (
            ('config.py', 'detector.pth', 'detector.pth'),
            'detector.pth would be overwritten by the new file of this name; ',
        ),
        (('config.py', 'detector.pth', 'out.pth'), 'config.py must be the configuration of a detector or segmenter: '),
    ],
)
def test_mistakes_with_reparameterize_are_one_sentence_and_code_2(arguments, sentence, run):
    Path('config.py').write_text('a = 1\n')
    before = sorted(os.listdir())
    code, out, errors = run('reparameterize', *arguments)
    assert (code, out) == (2, '')
    assert errors.startswith(sentence) and errors.count('\n') == 1
    assert sorted(os.listdir()) == before
