# VMamba-T with the paper's ImageNet recipe.
_base_ = [
    "../_base_/models/classifier_vmamba.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "../_base_/schedules/vmamba_300e_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]

train_dataloader = dict(batch_size=128)
