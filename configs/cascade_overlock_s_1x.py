_base_ = [
    '_base_/models/cascade_mask_rcnn_fpn.py',
    '_base_/datasets/coco_3x.py',
    '_base_/schedules/coco_1x.py',
    '_base_/det_runtime.py',
]

model = dict(
    backbone=dict(arch='s', drop_path_rate=0.4, init_cfg=dict(type='Pretrained', checkpoint='overlock_s_in1k')),
    neck=dict(in_channels=[64, 128, 448, 640]),
)

# Swin's Cascade recipe at either length: half of Mask R-CNN's 1x rate.
optim_wrapper = dict(optimizer=dict(lr=1e-4))
