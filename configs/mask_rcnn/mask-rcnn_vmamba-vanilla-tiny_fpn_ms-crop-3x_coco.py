_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        arch="vanilla-tiny",
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.vanilla_tiny}}),
    ),
)
