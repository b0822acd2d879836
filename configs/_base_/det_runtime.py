default_scope = 'mmdet'
# Registers the backbones with mmdet, from any working directory.
custom_imports = dict(imports=['mmdet_overlock'], allow_failed_imports=False)

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='coco/bbox_mAP', rule='greater'),
    visualization=dict(type='DetVisualizationHook'),
)

# Several processes train with every BatchNorm synchronized, as the authors do; without a launcher nothing changes.
sync_bn = 'torch'

# Named after the run by mmengine, so that two runs of one process do not write into one log.
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)

load_from = None
resume = False

# mmdet's DetTTAModel merges the boxes of all views with NMS and refuses masks: `tools/test.py --tta` tests boxes alone.
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
