_base_ = "./mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        arch="base-s2l15",
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.base_s2l15}}),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
