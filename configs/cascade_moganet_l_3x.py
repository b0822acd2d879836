# Trained as B is, with layer-wise decay.
_base_ = 'cascade_moganet_b_3x.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='l', drop_path_rate=0.3, init_cfg=dict(type='Pretrained', checkpoint='moganet_l_in1k')
    ),
    neck=dict(in_channels=[64, 160, 320, 640]),
)
