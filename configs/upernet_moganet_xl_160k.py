_base_ = '_base_/upernet_moganet_160k.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='xl', drop_path_rate=0.4, init_cfg=dict(type='Pretrained', checkpoint='moganet_xl_in1k')
    ),
    decode_head=dict(in_channels=[96, 192, 480, 960]),
    auxiliary_head=dict(in_channels=480),
)
