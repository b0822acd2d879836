# UperNet with MogaNet on ADE20K, 160k iterations.
_base_ = ['models/upernet.py', 'datasets/ade20k.py', 'schedules/ade20k_160k.py', 'seg_runtime.py']

# The authors resize linearly to multiples of 32, with one view and with several.
test_pipeline, tta_pipeline = _base_.test_pipeline, _base_.tta_pipeline
test_pipeline[2].interpolation = tta_pipeline[1].transforms[1][0].interpolation = 'bilinear'
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    # The authors' keys, for names that are theirs: layer scales, the scales of both aggregations, norms but the stem's.
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={'layer_scale': dict(decay_mult=0.0), 'scale': dict(decay_mult=0.0), 'norm': dict(decay_mult=0.0)},
    ),
)
train_cfg = dict(val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))

# The authors' backbones kept the statistics of each process, whatever their settings said;
# `model.backbone.norm_cfg.type=SyncBN` synchronizes them.
sync_bn = None
