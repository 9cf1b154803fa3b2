# Table 9: VMamba-T's last layer tuned at 288 pixels.
_base_ = [
    "../_base_/models/linear_vmamba.py",
    "../_base_/datasets/imagenet_test_288.py",
    "../_base_/schedules/vmamba_linear_imagenet.py",
    "mmpretrain::_base_/default_runtime.py",
]

# The features of an image are always the same, as in the released tool.
train_dataloader = dict(
    batch_size=64, dataset=dict(pipeline={{_base_.test_dataloader.dataset.pipeline}})
)
load_from = {{_base_.vmamba_weights.tiny_s1l8}}
