_base_ = '_base_/mask_rcnn_1x.py'

model = dict(
    backbone=dict(
        arch='xt',
        # Ours: the authors publish no XT configuration for dense prediction.
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='overlock_xt_in1k'),
    ),
    neck=dict(in_channels=[56, 112, 340, 420]),
)
