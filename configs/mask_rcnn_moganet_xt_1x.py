_base_ = ['_base_/models/mask_rcnn_fpn.py', '_base_/moganet_coco_1x.py']

model = dict(
    backbone=dict(
        type='MogaNet', arch='xt', drop_path_rate=0.05, init_cfg=dict(type='Pretrained', checkpoint='moganet_xt_in1k')
    ),
    neck=dict(in_channels=[32, 64, 96, 192]),
)
