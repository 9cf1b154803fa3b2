# The paper's COCO schedule: AdamW, batch 16 (8 GPUs x 2), 12 epochs. The steps at 8 and 11 are the
# released configuration's; the paper's text says 9 and 11.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

# mmengine does not know the official code's `_no_weight_decay` marks, so the published runs decayed
# A_logs and Ds, and so does this one.
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
