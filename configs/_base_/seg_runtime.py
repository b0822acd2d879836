default_scope = 'mmseg'
# Registers the backbones with mmseg, from any working directory.
custom_imports = dict(imports=['mmseg_overlock'], allow_failed_imports=False)

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=8000, max_keep_ckpts=3, save_best='mIoU', rule='greater'
    ),
    visualization=dict(type='SegVisualizationHook'),
)

# Several processes train with every BatchNorm synchronized, as the authors do; without a launcher nothing changes.
sync_bn = 'torch'

# Named after the run by mmengine, so that two runs of one process do not write into one log.
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=False)

load_from = None
resume = False

# The mean of all views' class probabilities.
tta_model = dict(type='SegTTAModel')
