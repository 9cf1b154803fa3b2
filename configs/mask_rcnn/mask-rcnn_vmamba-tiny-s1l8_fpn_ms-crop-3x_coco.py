_base_ = [
    "../_base_/models/mask-rcnn_vmamba_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/schedules/vmamba_3x_coco.py",
]
