# 12 epochs of AdamW, the rate divided by 10 after 8 and 11. Swin's rate, which the authors keep for 3x.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# mmengine's warm-up reaches the full rate at `end` - 1; mmcv 1.7's reached it at 500.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=501),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # The authors' key `norm` under our names: the dynamic blocks' two LayerNorms and the output norms, nothing else.
    paramwise_cfg=dict(
        custom_keys={'norm1': dict(decay_mult=0.0), 'norm2': dict(decay_mult=0.0), 'output_norms': dict(decay_mult=0.0)}
    ),
)

# The learning rate belongs to 8 GPUs x 2 images; `--auto-scale-lr` scales it for another total.
auto_scale_lr = dict(enable=False, base_batch_size=16)
