_base_ = '_base_/upernet_160k.py'

model = dict(
    backbone=dict(arch='s', drop_path_rate=0.3, init_cfg=dict(type='Pretrained', checkpoint='overlock_s_in1k')),
    decode_head=dict(in_channels=[64, 128, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
