# Fits a handful of ADE20K images from random weights and evaluates on these same images: whether labels, losses and
# evaluation of a data set fit together shows in minutes, on a CPU too. Give the images with --data-root.
_base_ = '../upernet_overlock_xt_160k.py'

crop_size = (160, 160)
scale = (640, 160)

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        # Fitting by heart is the aim.
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    # Heads of the full width would cost many times the backbone.
    decode_head=dict(channels=128),
    auxiliary_head=dict(channels=64),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]

# Total batch size 4 = 1 device x 4.
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'), pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader

max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=100)
# Random weights need a higher rate than fine-tuning.
optim_wrapper = dict(optimizer=dict(lr=4e-4), clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
auto_scale_lr = dict(base_batch_size=4)

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_iters, save_best=None))
log_processor = dict(window_size=20)
randomness = dict(seed=0)
