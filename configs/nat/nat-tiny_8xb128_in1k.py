# NAT-T with the released recipe: batch 1024, AdamW at 1e-3, weight decay 0.05, 300 epochs of which 20
# warm up; neither a moving average nor clipping.
_base_ = [
    "../_base_/models/classifier_nat.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "../_base_/schedules/vmamba_300e_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(clip_grad=None, paramwise_cfg=dict(custom_keys={".rpb": dict(decay_mult=0.0)}))
custom_hooks = []
