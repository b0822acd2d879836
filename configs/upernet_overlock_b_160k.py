_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/ade20k_160k.py',
    '_base_/seg_runtime.py',
]

model = dict(
    backbone=dict(arch='b', drop_path_rate=0.5, init_cfg=dict(type='Pretrained', checkpoint='overlock_b_in1k')),
    decode_head=dict(in_channels=[80, 160, 528, 720]),
    auxiliary_head=dict(in_channels=528),
)
