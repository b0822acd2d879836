_base_ = '_base_/retinanet_moganet_1x.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='t', drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='moganet_t_in1k')
    ),
    neck=dict(in_channels=[32, 64, 128, 256]),
)
