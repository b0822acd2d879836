# COCO, 12 epochs, as the authors train Mask R-CNN: at one scale and twice the rate of 36 epochs.
_base_ = ['datasets/coco.py', 'schedules/coco_1x.py', 'det_runtime.py']

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(optimizer=dict(lr=2e-4))
