# The paper's longer COCO schedule, for multi-scale training: 36 epochs with steps at 27 and 33.
_base_ = "./vmamba_1x_coco.py"

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
