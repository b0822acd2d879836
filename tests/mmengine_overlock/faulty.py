"""A toy model whose loss or gradients are not finite for some images, and a loss scale on CPUs."""

import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPERS
from mmengine.structures import BaseDataElement

from tests.toy import ToyDataset, ToyModel

CONFIG = """
custom_imports['imports'] += ['tests.mmengine_overlock.faulty']
model.update(type='FaultyModel', norm_cfg=dict(type='BN'), faults={faults!r})
for part in (train_dataloader, val_dataloader):
    part.update(
        dataset=dict(type='NamedDataset'),
        collate_fn=dict(type='pseudo_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
"""


@DATASETS.register_module()
class NamedDataset(ToyDataset):
    """Points with the names of images, `0.jpg` and so on."""

    def __getitem__(self, index):
        sample = BaseDataElement(metainfo=dict(img_path=f'{index}.jpg'), target=self.inputs[index].sum())
        return dict(inputs=self.inputs[index], data_samples=sample)


@MODELS.register_module()
class FaultyModel(ToyModel):
    """Goes wrong as `faults` says for a batch with one of its images."""

    def __init__(self, faults, **kwargs):
        super().__init__(**kwargs)
        self.faults = faults

    def forward(self, inputs, data_samples, mode='tensor'):
        targets = torch.stack([sample.target for sample in data_samples])
        x = torch.stack(inputs)
        fault = next((self.faults[s.img_path] for s in data_samples if s.img_path in self.faults), '')
        if mode == 'loss' and fault == 'map':
            x = x * torch.inf
        out = super().forward(x, targets, mode)
        if mode == 'loss':
            out = dict(loss_toy=out['loss'])
            out['loss_more'] = self.toy_head.weight.square().mean()
            if fault == 'loss':
                out['loss_more'] = out['loss_more'] * torch.nan
            if fault == 'gradient':
                # The root of zero has an infinite slope.
                out['loss_more'] = (out['loss_more'] * 0).sqrt()
            if fault == 'constant':
                out['loss_more'] = out['loss_more'] + torch.inf
        return out


@OPTIM_WRAPPERS.register_module()
class ScaledOptimWrapper(AmpOptimWrapper):
    """mmengine's wrapper with a loss scale, which by itself refuses CPUs, in float32."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self.loss_scaler, self._scale_update_param = torch.amp.GradScaler('cpu'), None
        self.cast_dtype = torch.bfloat16


@HOOKS.register_module()
class LateFaults(Hook):
    """Give the model its faults at the start of an epoch."""

    def __init__(self, epoch, faults):
        self.epoch, self.faults = epoch, faults

    def before_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            runner.model.faults = self.faults


@HOOKS.register_module()
class Spoil(Hook):
    """Make a weight infinite at the end of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def after_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            runner.model.backbone.fc.bias.data[0] = torch.inf
