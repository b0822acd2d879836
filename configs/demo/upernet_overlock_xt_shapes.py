# UperNet with OverLoCK-XT on the semantic maps of the drawn shapes, from random weights. `make demo` draws the data.
_base_ = '../upernet_overlock_xt_160k.py'

data_root = 'work_dirs/demo/data/ade/'
# The ground is a class here: 0 in the maps, unlike ADE20K's unlabeled 0.
metainfo = dict(
    classes=('ground', 'circle', 'square', 'triangle', 'star', 'ring'),
    palette=[(0, 0, 0), (230, 25, 75), (60, 180, 75), (67, 99, 216), (245, 130, 49), (177, 58, 214)],
)
num_classes = 6
size = (128, 128)

model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(
        # Too few iterations to need regularization.
        drop_path_rate=0.0,
        # Random weights: what is shown is learned here.
        init_cfg=None,
    ),
    # Narrow heads: they would cost more than the backbone.
    decode_head=dict(channels=128, num_classes=num_classes),
    auxiliary_head=dict(channels=64, num_classes=num_classes),
)

# Images are drawn at the size at which they are used.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=False),
    dict(type='PackSegInputs'),
]
# ADE20K's own class would refuse names that are not ADE20K's.
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo, reduce_zero_label=False)

# Total batch size 4 = 1 device x 4.
train_dataloader = dict(
    batch_size=4,
    # Reading a small image takes a hundredth of a step; workers would only take cores away.
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **dataset)
)
test_dataloader = val_dataloader

max_iters = 300
train_cfg = dict(max_iters=max_iters, val_interval=100)
# From random weights and in few steps: a higher rate than fine-tuning's.
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=max_iters),
]
auto_scale_lr = dict(base_batch_size=4)

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters, save_best=None))
log_processor = dict(window_size=10)
randomness = dict(seed=0)
