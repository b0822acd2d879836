_base_ = '_base_/upernet_moganet_160k.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='t', drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='moganet_t_in1k')
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256]),
    auxiliary_head=dict(in_channels=128),
)
