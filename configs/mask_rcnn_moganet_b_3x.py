_base_ = ['_base_/models/mask_rcnn_fpn.py', '_base_/moganet_coco_3x.py']

model = dict(
    backbone=dict(
        type='MogaNet', arch='b', drop_path_rate=0.3, init_cfg=dict(type='Pretrained', checkpoint='moganet_b_in1k')
    ),
    neck=dict(in_channels=[64, 160, 320, 512]),
)
