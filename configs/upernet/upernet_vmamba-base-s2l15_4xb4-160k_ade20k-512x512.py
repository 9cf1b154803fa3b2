_base_ = "./upernet_vmamba-tiny-s1l8_4xb4-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="base-s2l15",
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.base_s2l15}}),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
