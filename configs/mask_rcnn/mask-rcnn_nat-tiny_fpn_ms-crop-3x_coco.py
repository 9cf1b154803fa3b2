# NAT's released recipe (detection/configs/nat/mask_rcnn_nat_tiny_3x_coco.py), which differs from
# VMamba's in the warm-up alone. The released runs were in mixed precision.
_base_ = [
    "../_base_/models/mask-rcnn_nat_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/schedules/vmamba_3x_coco.py",
]

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0))))
