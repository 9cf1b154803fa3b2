# Semantic FPN's usual schedule for hierarchical transformers: AdamW, batch 16, 80k iterations.
_base_ = "mmseg::_base_/schedules/schedule_80k.py"

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=80000)]
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
auto_scale_lr = dict(enable=False, base_batch_size=16)
