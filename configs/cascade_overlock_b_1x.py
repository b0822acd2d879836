_base_ = ['_base_/models/cascade_mask_rcnn_fpn.py', '_base_/coco_1x.py']

model = dict(
    backbone=dict(arch='b', drop_path_rate=0.6, init_cfg=dict(type='Pretrained', checkpoint='overlock_b_in1k')),
    neck=dict(in_channels=[80, 160, 528, 720]),
)
