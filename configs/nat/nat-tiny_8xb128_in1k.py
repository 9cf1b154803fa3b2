# NAT-T with the released recipe (classification/configs/nat_tiny.yml and the defaults of
# classification/train.py): batch 1024, AdamW at 1e-3, weight decay 0.05, 300 epochs of which 20
# warm up, cosine decay to 5e-6, gradients clipped at a norm of 5, no moving average. The released
# runs were in mixed precision and went on for ten epochs at the last learning rate, which this one
# does not.
_base_ = [
    "../_base_/models/classifier_nat.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "../_base_/schedules/vmamba_300e_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={".rpb": dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR", eta_min=5e-6, by_epoch=True, begin=20, convert_to_iter_based=True
    ),
]
custom_hooks = []
