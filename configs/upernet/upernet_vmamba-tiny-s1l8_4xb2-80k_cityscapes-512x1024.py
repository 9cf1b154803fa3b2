# Cityscapes' 19 classes are the base's.
_base_ = [
    "../_base_/models/upernet_vmamba.py",
    "mmseg::_base_/datasets/cityscapes.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/schedules/vmamba_80k_cityscapes.py",
]

model = dict(data_preprocessor=dict(size=(512, 1024)))
