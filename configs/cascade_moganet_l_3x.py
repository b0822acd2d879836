_base_ = ['_base_/models/cascade_mask_rcnn_fpn.py', '_base_/moganet_coco_3x.py']

model = dict(
    backbone=dict(
        type='MogaNet', arch='l', drop_path_rate=0.3, init_cfg=dict(type='Pretrained', checkpoint='moganet_l_in1k')
    ),
    neck=dict(in_channels=[64, 160, 320, 640]),
)

# A longer warm-up than Mask R-CNN's.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1001),
    _base_.param_scheduler[1],
]

optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.8),
)
