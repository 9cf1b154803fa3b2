# Vim's released ADE20K schedule: AdamW, batch 32 (4 GPUs x 8), 60k iterations, 1500 of warm-up,
# linear decay (seg/configs/vim/upernet/upernet_vim_tiny_24_512_slide_60k.py, with what
# seg/scripts/ft_vim_tiny_upernet.sh changes: 2e-4, weight decay 0.1). The paper's text says batch
# 16, 160k iterations and 6e-5. The layer-wise decay
# (seg/mmcv_custom/layer_decay_optimizer_constructor.py) knows the blocks by another name than
# Vim's: it slows the patches and positions alone, by 25 layers.
_base_ = "./vmamba_160k_ade20k.py"

train_cfg = dict(max_iters=60000, val_interval=6000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=60000),
]
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(
        _delete_=True,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            "patch_embed.proj.bias": dict(lr_mult=0.92**25, decay_mult=0.0),
            "patch_embed.proj.weight": dict(lr_mult=0.92**25),
            "pos_embed": dict(lr_mult=0.92**25),
        },
    ),
)
default_hooks = dict(checkpoint=dict(interval=6000))
auto_scale_lr = dict(base_batch_size=32)
