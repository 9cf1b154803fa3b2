_base_ = "./upernet_vmamba-tiny-s1l8_4xb4-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="vanilla-small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.vanilla_small}}),
    ),
)
