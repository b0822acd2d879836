"""A model, a data set, a metric and a configuration of them that trains in milliseconds."""

import random
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset

CONFIG = """
custom_imports = dict(imports=['tests.toy'], allow_failed_imports=False)
# mmengine shares loggers and message hubs between the runs of one process by this name.
experiment_name = {name!r}
model = dict(type='ToyModel', backbone=dict(type='ToyBackbone'))
loader = dict(batch_size=2, num_workers=0, collate_fn=dict(type='default_collate'), dataset=dict(type='ToyDataset'))
train_dataloader = dict(**loader, sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(**loader, sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = dict(**loader, sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = test_evaluator = dict(type='ToyMetric')
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=4)
val_cfg = test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[1, 3], gamma=0.5)]
default_hooks = dict(logger=dict(type='LoggerHook', interval=4), checkpoint=dict(type='CheckpointHook', interval=1))
randomness = dict(seed=0)
"""

BY_ITERATION = """
train_cfg = dict(type='IterBasedTrainLoop', max_iters=12, val_interval=12)
train_dataloader = dict(**loader, sampler=dict(type='InfiniteSampler', shuffle=True))
param_scheduler = [dict(type='PolyLR', by_epoch=False, power=1.0, eta_min=0.0, end=12)]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4))
log_processor = dict(by_epoch=False)
"""


def write_config(folder: Path, more: str = '', by_iteration: bool = False) -> Path:
    """Write the configuration into a folder, under a new name, with more statements at its end."""
    path = folder / f'toy_{uuid.uuid4().hex[:8]}.py'
    path.write_text(CONFIG.format(name=path.stem) + BY_ITERATION * by_iteration + more)
    return path


@DATASETS.register_module()
class ToyDataset(Dataset):
    """Points on a plane, and the values of a linear function there."""

    def __init__(self, length=16, noise=0.0, delay=0.0):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(length, 4, generator=generator)
        self.noise, self.delay = noise, delay

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        inputs = self.inputs[index]
        time.sleep(self.delay)
        if self.noise:
            # Of all three generators that transforms use.
            noise = torch.tensor([random.random(), np.random.rand(), float(torch.rand(())), 0.0])
            inputs = inputs + self.noise * noise
        return dict(inputs=inputs, targets=self.inputs[index].sum())

    def get_data_info(self, index):
        return dict(width=1 + index % 3, height=2)


@MODELS.register_module()
class ToyBackbone(BaseModule):
    def __init__(self, width=8, init_cfg=None):
        super().__init__(init_cfg)
        self.fc = nn.Linear(4, width)

    def forward(self, x):
        return self.fc(x).relu()


@MODELS.register_module()
class ToyModel(BaseModel):
    def __init__(self, backbone, norm_cfg=None, dropout=0.0, data_preprocessor=None, init_cfg=None):
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.norm = {None: nn.Identity, 'BN': nn.BatchNorm1d, 'SyncBN': nn.SyncBatchNorm}[
            norm_cfg and norm_cfg['type']
        ](self.backbone.fc.out_features)
        self.dropout = nn.Dropout(dropout)
        self.toy_head = nn.Linear(self.backbone.fc.out_features, 1)

    def forward(self, inputs, targets=None, mode='tensor'):
        outputs = self.toy_head(self.dropout(self.norm(self.backbone(inputs)))).squeeze(-1)
        if mode == 'loss':
            return dict(loss=(outputs - targets).square().mean())
        return [dict(pred=output, target=target) for output, target in zip(outputs, targets, strict=True)]


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """The mean error, of every image once."""

    def process(self, data_batch, data_samples):
        self.results.extend(float(sample['pred'] - sample['target']) for sample in data_samples)

    def compute_metrics(self, results):
        return dict(error=sum(map(abs, results)) / len(results), images=len(results))
