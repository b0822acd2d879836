# Cascade Mask R-CNN with MogaNet on COCO, 36 epochs.
_base_ = ['models/cascade_mask_rcnn_fpn.py', 'moganet_coco_3x.py']

# A longer warm-up than Mask R-CNN's.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=1001),
    _base_.param_scheduler[1],
]
