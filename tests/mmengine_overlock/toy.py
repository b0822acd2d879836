"""A model, a data set and a metric that train in milliseconds, for configurations that name this module."""

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset


@DATASETS.register_module()
class ToyDataset(Dataset):
    """Points on a plane, and the values of a linear function there."""

    def __init__(self, length=16):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(length, 4, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return dict(inputs=self.inputs[index], targets=self.inputs[index].sum())


@MODELS.register_module()
class ToyBackbone(BaseModule):
    def __init__(self, width=8, init_cfg=None):
        super().__init__(init_cfg)
        self.fc = nn.Linear(4, width)

    def forward(self, x):
        return self.fc(x).relu()


@MODELS.register_module()
class ToyModel(BaseModel):
    def __init__(self, backbone, norm_cfg=None, data_preprocessor=None, init_cfg=None):
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.norm = {None: nn.Identity, 'BN': nn.BatchNorm1d, 'SyncBN': nn.SyncBatchNorm}[
            norm_cfg and norm_cfg['type']
        ](self.backbone.fc.out_features)
        self.toy_head = nn.Linear(self.backbone.fc.out_features, 1)

    def forward(self, inputs, targets=None, mode='tensor'):
        outputs = self.toy_head(self.norm(self.backbone(inputs))).squeeze(-1)
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
