_base_ = '_base_/upernet_160k.py'

model = dict(
    backbone=dict(arch='t', drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint='overlock_t_in1k')),
    decode_head=dict(in_channels=[64, 128, 384, 640]),
    auxiliary_head=dict(in_channels=384),
)
