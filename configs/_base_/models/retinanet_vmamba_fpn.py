_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "../weights.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.2,
        # The pyramid starts at the second stage.
        out_indices=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vmamba_weights.tiny_s1l8}}),
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
    # Boxes stay in float32 under mixed precision; without it nothing differs.
    bbox_head=dict(type="mmvmamba.Float32RetinaHead"),
)
