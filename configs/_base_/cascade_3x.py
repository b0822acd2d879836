# Cascade Mask R-CNN on COCO, 36 epochs.
_base_ = [
    'models/cascade_mask_rcnn_fpn.py',
    'datasets/coco.py',
    'schedules/coco_adamw.py',
    'schedules/coco_3x.py',
    'det_runtime.py',
]
