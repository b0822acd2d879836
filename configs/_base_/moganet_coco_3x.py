# COCO as MogaNet's authors train on it, 36 epochs, the rate divided by 10 after 27 and 33.
_base_ = ['datasets/coco.py', 'schedules/coco_1x.py', 'det_runtime.py']

train_cfg = dict(max_epochs=36)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    # The authors' keys, for names that are theirs: layer scales, the scales of both aggregations, norms but the stem's.
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={'layer_scale': dict(decay_mult=0.0), 'scale': dict(decay_mult=0.0), 'norm': dict(decay_mult=0.0)},
    ),
)

# The authors trained with the statistics of each process; `model.backbone.norm_cfg.type=SyncBN` synchronizes them.
sync_bn = None
