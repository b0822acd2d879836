# 80k iterations of AdamW without warm-up, polynomial decay to zero, evaluated every 4000 iterations.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80000, val_interval=4000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4))

# The factor reaches zero at 80000, as by mmcv 1.7: mmengine ends at `end` - 1.
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=80001)]

# The learning rate belongs to 8 GPUs x 4 images; `--auto-scale-lr` scales it for another total.
auto_scale_lr = dict(enable=False, base_batch_size=32)
