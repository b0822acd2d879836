# Cascade Mask R-CNN with OverLoCK-XT on drawn shapes (`make demo`), from random weights in minutes on two CPU cores.
_base_ = '../cascade_overlock_xt_1x.py'

data_root = 'work_dirs/demo/data/coco/'
metainfo = dict(
    classes=('circle', 'square', 'triangle', 'star', 'ring'),
    palette=[(230, 25, 75), (60, 180, 75), (67, 99, 216), (245, 130, 49), (177, 58, 214)],
)
num_classes = 5
# The size at which the images are drawn.
size = (128, 128)

# Narrow neck and heads: five classes of shapes need no more, and full ones would cost more than the backbone.
width = 128

model = dict(
    backbone=dict(
        # Too few iterations to need regularization.
        drop_path_rate=0.0,
        # Random weights: what is shown is learned here.
        init_cfg=None,
    ),
    # No level at stride 64: it would be two pixels wide.
    neck=dict(out_channels=width, num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        # Anchors of 16 to 181 pixels, two sizes an octave: shapes are 10 to 60 pixels wide and about square.
        anchor_generator=dict(scales=[4.0, 5.66], ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        # Two small layers instead of four convolutions and a large layer; one regressor learns from all classes.
        bbox_head=[
            dict(
                head,
                num_shared_convs=0,
                num_shared_fcs=2,
                in_channels=width,
                fc_out_channels=256,
                num_classes=num_classes,
                reg_class_agnostic=True,
            )
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=64, num_classes=num_classes),
    ),
    # A few shapes an image need few proposals.
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=64),
        rcnn=[dict(stage, sampler=dict(stage.sampler, num=32)) for stage in _base_.model.train_cfg.rcnn],
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=64)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]

# Total batch size 4 = 1 device x 4.
train_dataloader = dict(
    batch_size=4,
    # Reading a small image takes a hundredth of a step; workers would only take cores away.
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    batch_sampler=None,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_iters = 250
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=50)
# From random weights and in few steps: a higher rate than fine-tuning's, and down to zero by a cosine.
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, eta_min=0.0),
]
auto_scale_lr = dict(base_batch_size=4)

default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=max_iters, save_best=None, save_optimizer=False),
)
log_processor = dict(by_epoch=False, window_size=10)
randomness = dict(seed=0)
