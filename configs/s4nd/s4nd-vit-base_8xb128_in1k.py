# S4ND-ViT-B with the released recipe (vit/vit_b_16_s4_imagenet_v2.yaml below
# configs/experiment/s4nd of state-spaces/s4): batch 1024, learning rate 1e-3, 10 epochs of warm-up,
# weight decay 0.03, an exponential moving average of the weights (0.99996). The released runs went
# on for ten epochs at the last learning rate, which this one does not.
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
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=10, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=10),
]
custom_hooks = [dict(type="EMAHook", momentum=4e-5, priority="ABOVE_NORMAL")]
