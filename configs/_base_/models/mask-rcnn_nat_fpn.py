_base_ = "./mask-rcnn_vmamba_fpn.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.NAT",
        arch="tiny",
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth",
        ),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
