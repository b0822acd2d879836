# AdamW for COCO. Swin's rate, which the authors keep for 3x.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # The authors' key `norm` under our names: the dynamic blocks' two LayerNorms and the output norms, nothing else.
    paramwise_cfg=dict(
        custom_keys={'norm1': dict(decay_mult=0.0), 'norm2': dict(decay_mult=0.0), 'output_norms': dict(decay_mult=0.0)}
    ),
)

# The learning rate belongs to 8 GPUs x 2 images; `--auto-scale-lr` scales it for another total.
auto_scale_lr = dict(enable=False, base_batch_size=16)
