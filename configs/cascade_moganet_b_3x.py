_base_ = '_base_/cascade_moganet_3x.py'

model = dict(
    backbone=dict(
        type='MogaNet', arch='b', drop_path_rate=0.2, init_cfg=dict(type='Pretrained', checkpoint='moganet_b_in1k')
    ),
    neck=dict(in_channels=[64, 160, 320, 512]),
)

optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.8),
)
