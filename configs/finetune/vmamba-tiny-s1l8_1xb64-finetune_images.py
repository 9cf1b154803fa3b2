# A classifier for your own images: one folder per class in DATA_ROOT/train and DATA_ROOT/val.
# These are the lines to edit; `classes` are the folders' names.
data_root = "data/my_images/"
classes = ["cat", "dog", "horse"]
max_epochs = 20

# Full names, so that a copy of this file works anywhere.
_base_ = [
    "mmvmamba::_base_/models/classifier_vmamba.py",
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/default_runtime.py",
    "mmvmamba::_base_/weights.py",
]

model = dict(head=dict(num_classes=len(classes), cal_acc=True), train_cfg=None)
data_preprocessor = dict(num_classes=len(classes))

extensions = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=224, backend="pillow", interpolation="bicubic"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type="CustomDataset",
        data_root=data_root,
        data_prefix="train",
        classes=classes,
        extensions=extensions,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type="CustomDataset",
        data_root=data_root,
        data_prefix="val",
        classes=classes,
        extensions=extensions,
        pipeline={{_base_.test_pipeline}},
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
# The warm-up is a twentieth of the training, whatever its length.
warm_up = max_epochs / 20
param_scheduler = [
    dict(
        type="LinearLR", start_factor=0.01, by_epoch=True, end=warm_up, convert_to_iter_based=True
    ),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        by_epoch=True,
        begin=warm_up,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
# The rate above is for 256 images a step, and follows the batch size and the number of GPUs.
auto_scale_lr = dict(enable=True, base_batch_size=256)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best="auto"))

load_from = {{_base_.vmamba_weights.tiny_s1l8}}
load_ignore = ["head.head"]
