# COCO, 12 epochs: Swin's rate and scales, as for 36.
_base_ = ['datasets/coco.py', 'schedules/coco_1x.py', 'det_runtime.py']
