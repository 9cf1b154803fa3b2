_base_ = [
    "../_base_/models/retinanet_vmamba_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/schedules/vmamba_1x_coco.py",
]
