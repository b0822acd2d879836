# 36 epochs, steps after 27 and 33.
_base_ = './coco_1x.py'

train_cfg = dict(max_epochs=36)

# Half of 1x's rate, as the authors train 3x.
optim_wrapper = dict(optimizer=dict(lr=1e-4))

# Full rate at iteration 500, as by mmcv 1.7: mmengine reaches it at `end` - 1.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=501),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
