# DINO with upstream's recipe for ResNet-50: the backbone learns at a tenth of the rate.
_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "../_base_/weights.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vmamba_weights.tiny_s1l8}}),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
