# Table 9: VMamba-T, trained at 224 pixels, tested at 512.
_base_ = [
    "../_base_/models/classifier_vmamba.py",
    "../_base_/datasets/imagenet_test_512.py",
    "../_base_/schedules/vmamba_300e_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]

train_dataloader = dict(batch_size=128)
