# The paper's ImageNet recipe: 300 epochs, batch 1024, Swin Transformer's augmentation and schedule,
# an exponential moving average of the weights.
_base_ = [
    "mmpretrain::_base_/models/swin_transformer/tiny_224.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        out_indices=(3,),
        # The head has the norm.
        outnorm=False,
        drop_path_rate=0.2,
    ),
    neck=None,
    head=dict(
        _delete_=True,
        type="mmvmamba.VMambaClsHead",
        num_classes=1000,
        in_channels=768,
        loss=dict(type="mmpretrain.LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        cal_acc=False,
    ),
    # The models' own initialisation is the paper's.
    init_cfg=None,
)

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
