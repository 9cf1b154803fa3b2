_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        arch="vanilla-base",
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.vanilla_base}}),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
