import uuid
from pathlib import Path

import pytest

CONFIG = """
custom_imports = dict(imports=['toy'], allow_failed_imports=False)
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


@pytest.fixture
def write_toy(tmp_path, monkeypatch):
    """Writes a configuration of the toy model into the folder that the test runs in."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)

    def write(more='', by_iteration=False):
        path = tmp_path / f'toy_{uuid.uuid4().hex[:8]}.py'
        path.write_text(CONFIG.format(name=path.stem) + BY_ITERATION * by_iteration + more)
        return path

    return write
