_base_ = ['_base_/models/cascade_mask_rcnn_fpn.py', '_base_/moganet_coco_3x.py']

model = dict(
    backbone=dict(
        type='MogaNet', arch='s', drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='moganet_s_in1k')
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

# A longer warm-up than Mask R-CNN's.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1001),
    _base_.param_scheduler[1],
]
