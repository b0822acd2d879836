_base_ = '_base_/upernet_160k.py'

# The drop path rate is ours: the authors publish no XT configuration for dense prediction.
model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.1, init_cfg=dict(type='Pretrained', checkpoint='overlock_xt_in1k')),
    decode_head=dict(in_channels=[56, 112, 340, 420]),
    auxiliary_head=dict(in_channels=340),
)
