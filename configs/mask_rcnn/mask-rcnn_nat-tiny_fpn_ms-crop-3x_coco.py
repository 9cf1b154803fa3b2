_base_ = [
    "../_base_/models/mask-rcnn_nat_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/schedules/vmamba_3x_coco.py",
]

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0))))
