# S4ND-ConvNeXt-T with the released recipe (convnext/convnext_timm_tiny_s4nd_imagenet.yaml below
# configs/experiment/s4nd of state-spaces/s4, with the command in its README): batch 3840, 20 epochs
# of warm-up, learning rate 4e-3 but 1e-3 for all of a kernel, weight decay 0.05, no moving average.
_base_ = [
    "../_base_/models/classifier_s4nd-convnext.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "../_base_/schedules/s4nd_300e_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]

train_dataloader = dict(
    batch_size=120, sampler=dict(_delete_=True, type="RepeatAugSampler", shuffle=True)
)
optim_wrapper = dict(
    optimizer=dict(lr=4e-3),
    paramwise_cfg=dict(
        custom_keys={
            name: dict(lr_mult=0.25) for name in (".inv_dt", ".A_real", ".A_imag", ".B", ".C")
        }
    ),
)
custom_hooks = []
auto_scale_lr = dict(base_batch_size=3840)
