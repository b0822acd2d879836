_base_ = ['_base_/models/mask_rcnn_fpn.py', '_base_/coco_1x_one_scale.py']

model = dict(
    backbone=dict(arch='s', drop_path_rate=0.4, init_cfg=dict(type='Pretrained', checkpoint='overlock_s_in1k')),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
