_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        arch="tiny-s2l5",
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.tiny_s2l5}}),
    ),
)
