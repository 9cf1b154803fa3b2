_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "../weights.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vmamba_weights.tiny_s1l8}}),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    # Boxes stay in float32 under mixed precision; without it nothing differs.
    rpn_head=dict(type="mmvmamba.Float32RPNHead"),
    roi_head=dict(bbox_roi_extractor=dict(type="mmvmamba.Float32RoIExtractor")),
)
