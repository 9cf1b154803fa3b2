_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        arch="vanilla-small",
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.vanilla_small}}),
    ),
)
