# RetinaNet with MogaNet on COCO, 12 epochs at one scale; boxes alone.
_base_ = ['models/retinanet_fpn.py', 'datasets/coco.py', 'schedules/coco_1x.py', 'det_runtime.py']

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    # After Resize: predictions and truth are drawn and scored at the original size.
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

optim_wrapper = dict(
    # The authors' keys, for names that are theirs: layer scales, the scales of both aggregations, norms but the stem's.
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={'layer_scale': dict(decay_mult=0.0), 'scale': dict(decay_mult=0.0), 'norm': dict(decay_mult=0.0)},
    )
)

# The authors trained with the statistics of each process; `model.backbone.norm_cfg.type=SyncBN` synchronizes them.
sync_bn = None
