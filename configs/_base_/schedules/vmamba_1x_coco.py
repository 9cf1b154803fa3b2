# The paper's COCO schedule: AdamW, batch 16 (8 GPUs x 2), 12 epochs. The steps at 8 and 11 are the
# released configuration's; the paper's text says 9 and 11.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

# mmengine does not know the official code's `_no_weight_decay` marks, so the published runs decayed
# A_logs and Ds, and so does this one.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
