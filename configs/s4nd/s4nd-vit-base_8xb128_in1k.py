# S4ND-ViT-B with the released recipe: batch 1024, learning rate 1e-3, weight decay 0.03, an
# exponential moving average of the weights (0.99996).
_base_ = [
    "../_base_/models/classifier_s4nd-vit.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "../_base_/schedules/s4nd_300e_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]

train_dataloader = dict(
    batch_size=128, sampler=dict(_delete_=True, type="RepeatAugSampler", shuffle=True)
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.03))
custom_hooks = [dict(type="EMAHook", momentum=4e-5, priority="ABOVE_NORMAL")]
