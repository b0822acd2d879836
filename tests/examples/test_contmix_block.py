"""The example of the ContMix block shows its shapes and trains."""

import re
import runpy

import torch

from overlock import ContMixBlock
from tests.testing import ROOT


def test_the_block_trains_in_a_resnet_and_in_a_vision_transformer(capsys):
    example = runpy.run_path(str(ROOT / 'examples' / 'contmix_block.py'))
    for build, shape in ((example['resnet'], (2, 256, 14, 14)), (example['transformer'], (2, 192, 14, 14))):
        torch.manual_seed(0)
        model = build()
        before = {name: value.clone() for name, value in model.named_parameters()}
        assert example['train_step'](model) > 0
        assert re.findall(r'ContMixBlock: (\(.*\)) -> (\(.*\))', capsys.readouterr().out) == [(str(shape), str(shape))]
        (name,) = (name for name, module in model.named_modules() if isinstance(module, ContMixBlock))
        after = dict(model.get_submodule(name).named_parameters())
        assert all(not torch.equal(value, before[f'{name}.{key}']) for key, value in after.items())
