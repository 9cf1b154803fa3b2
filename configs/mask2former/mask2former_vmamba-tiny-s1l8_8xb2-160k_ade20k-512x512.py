# Mask2Former with upstream's recipe: the backbone learns at a tenth of the rate.
_base_ = ["mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py", "../_base_/weights.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vmamba_weights.tiny_s1l8}}),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
