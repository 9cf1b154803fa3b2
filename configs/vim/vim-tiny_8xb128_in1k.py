# Vim-Ti with the released recipe (vim/scripts/pt-vim-t.sh and the defaults of vim/main.py), which
# is DeiT's: batch 1024 (8 GPUs x 128), 300 epochs of which 5 warm up, AdamW at 1e-3, weight decay
# 0.1, repeated augmentation, an exponential moving average of the weights (0.99996), no clipping.
# The paper's text says weight decay 0.05.
_base_ = "mmpretrain::deit/deit-tiny_4xb256_in1k.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.VisionMamba", arch="tiny", drop_path_rate=0.0),
    head=dict(
        _delete_=True,
        type="LinearClsHead",
        num_classes=1000,
        in_channels=192,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
    ),
    # The backbone's own initialisation is the released one.
    init_cfg=None,
)
train_dataloader = dict(
    batch_size=128, sampler=dict(_delete_=True, type="RepeatAugSampler", shuffle=True)
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.1), clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5),
]
custom_hooks = [dict(type="EMAHook", momentum=4e-5, priority="ABOVE_NORMAL")]
