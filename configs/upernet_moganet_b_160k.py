_base_ = '_base_/upernet_moganet_160k.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='b', drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint='moganet_b_in1k')
    ),
    decode_head=dict(in_channels=[64, 160, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
