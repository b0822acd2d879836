# 160k iterations of AdamW, linear decay to zero, evaluated every 8000 iterations.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # The authors' key `norm` under our names: the dynamic blocks' two LayerNorms and the output norms, nothing else.
    paramwise_cfg=dict(
        custom_keys={'norm1': dict(decay_mult=0.0), 'norm2': dict(decay_mult=0.0), 'output_norms': dict(decay_mult=0.0)}
    ),
)

# Both factors multiply from iteration 0. They end at 1500 and 160000, as by mmcv 1.7: mmengine ends at `end` - 1.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160001),
]

# The learning rate belongs to 8 GPUs x 2 images; `--auto-scale-lr` scales it for another total.
auto_scale_lr = dict(enable=False, base_batch_size=16)
