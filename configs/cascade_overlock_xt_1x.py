_base_ = ['_base_/models/cascade_mask_rcnn_fpn.py', '_base_/coco_1x.py']

# The drop path rate is ours: the authors publish no XT configuration for dense prediction.
model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='overlock_xt_in1k')),
    neck=dict(in_channels=[56, 112, 340, 420]),
)
