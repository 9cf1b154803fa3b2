# Semantic FPN.
_base_ = ["mmseg::_base_/models/fpn_r50.py", "../weights.py"]

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vmamba_weights.tiny_s1l8}}),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
