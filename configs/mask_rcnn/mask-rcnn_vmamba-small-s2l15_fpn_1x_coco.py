_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        arch="small-s2l15",
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.small_s2l15}}),
    ),
)
