# COCO as MogaNet's authors train on it, 12 epochs at one scale.
_base_ = 'coco_1x_one_scale.py'

optim_wrapper = dict(
    # The authors' keys, for names that are theirs: layer scales, the scales of both aggregations, norms but the stem's.
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={'layer_scale': dict(decay_mult=0.0), 'scale': dict(decay_mult=0.0), 'norm': dict(decay_mult=0.0)},
    )
)

# The authors trained with the statistics of each process; `model.backbone.norm_cfg.type=SyncBN` synchronizes them.
sync_bn = None
