_base_ = "./mask-rcnn_nat-tiny_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.35,
        init_cfg=dict(
            checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_small.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
