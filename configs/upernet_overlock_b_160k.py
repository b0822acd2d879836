_base_ = '_base_/upernet_160k.py'

model = dict(
    backbone=dict(arch='b', drop_path_rate=0.5, init_cfg=dict(type='Pretrained', checkpoint='overlock_b_in1k')),
    decode_head=dict(in_channels=[80, 160, 528, 720]),
    auxiliary_head=dict(in_channels=528),
)
