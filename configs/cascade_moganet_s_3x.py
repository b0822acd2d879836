_base_ = '_base_/cascade_moganet_3x.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='s', drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='moganet_s_in1k')
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
