# Semantic FPN with MogaNet on ADE20K, 80k iterations.
_base_ = ['models/semantic_fpn.py', 'datasets/ade20k.py', 'schedules/ade20k_80k.py', 'seg_runtime.py']

# The authors resize linearly to multiples of 32, with one view and with several.
test_pipeline, tta_pipeline = _base_.test_pipeline, _base_.tta_pipeline
test_pipeline[2].interpolation = tta_pipeline[1].transforms[1][0].interpolation = 'bilinear'
# Total batch size 32 = 8 GPUs x 4.
train_dataloader = dict(batch_size=4)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

default_hooks = dict(checkpoint=dict(interval=4000))

# The authors' backbones kept the statistics of each process, whatever their settings said;
# `model.backbone.norm_cfg.type=SyncBN` synchronizes them.
sync_bn = None
