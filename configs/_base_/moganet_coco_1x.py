# COCO as MogaNet's authors train on it, 12 epochs at one scale.
_base_ = ['datasets/coco.py', 'schedules/coco_1x.py', 'det_runtime.py']

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

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
