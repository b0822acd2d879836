_base_ = '_base_/upernet_moganet_160k.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='s', drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='moganet_s_in1k')
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
