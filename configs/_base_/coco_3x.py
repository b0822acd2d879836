# COCO, 36 epochs.
_base_ = ['datasets/coco.py', 'schedules/coco_adamw.py', 'schedules/coco_3x.py', 'det_runtime.py']
