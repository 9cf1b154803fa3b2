# Vim-S, from its residual stream and with rotated positions (upernet_vim_small_24_512_slide_60k.py
# and ft_vim_small_upernet.sh of the released code, beside Vim-Ti's).
_base_ = "./upernet_vim-tiny_4xb8-60k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="small",
        rope=True,
        out_type="stream",
        init_cfg=dict(checkpoint={{_base_.vim_weights.small}}),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "patch_embed.proj.bias": dict(lr_mult=0.95**25),
            "patch_embed.proj.weight": dict(lr_mult=0.95**25),
            "pos_embed": dict(lr_mult=0.95**25),
        }
    ),
)
