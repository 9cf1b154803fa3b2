# A small VMamba classifier on ImageNet files, sized for two CPU cores: the classes and the recipe of
# configs/vmamba/, narrower, on smaller images and for fewer epochs, without Mixup and CutMix.
_base_ = [
    "./_base_/arch.py",
    "mmpretrain::_base_/models/swin_transformer/tiny_224.py",
    "mmpretrain::_base_/datasets/imagenet_bs32.py",
    "mmpretrain::_base_/default_runtime.py",
]

# The real ImageNet works too: point this at it.
data_root = "data/sample/imagenet/"
max_epochs = 20

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch={{_base_.arch}},
        out_indices=(3,),
        outnorm=False,
    ),
    neck=None,
    head=dict(
        _delete_=True,
        type="mmvmamba.VMambaClsHead",
        num_classes=1000,
        in_channels=256,
        loss=dict(type="mmpretrain.LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
    init_cfg=None,
    train_cfg=None,
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=96, crop_ratio_range=(0.4, 1.0)),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=104, edge="short"),
    dict(type="CenterCrop", crop_size=96),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=16, num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs,
        eta_min=1e-5,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=2), logger=dict(interval=10))
