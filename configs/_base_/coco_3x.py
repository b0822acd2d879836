# COCO, 36 epochs, the rate divided by 10 after 27 and 33.
_base_ = ['datasets/coco.py', 'schedules/coco_1x.py', 'det_runtime.py']

train_cfg = dict(max_epochs=36)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
