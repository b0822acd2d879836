_base_ = ['_base_/models/cascade_mask_rcnn_fpn.py', '_base_/coco_3x.py']

model = dict(
    backbone=dict(arch='t', drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint='overlock_t_in1k')),
    neck=dict(in_channels=[64, 128, 384, 640]),
)
