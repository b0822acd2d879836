_base_ = '_base_/upernet_moganet_160k.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='xt', drop_path_rate=0.05, init_cfg=dict(type='Pretrained', checkpoint='moganet_xt_in1k')
    ),
    decode_head=dict(in_channels=[32, 64, 96, 192]),
    auxiliary_head=dict(in_channels=96),
)
