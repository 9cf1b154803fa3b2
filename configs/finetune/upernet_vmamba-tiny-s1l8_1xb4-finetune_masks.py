# A segmentor for your own images and masks: DATA_ROOT/{images,masks}/{train,val}, a mask being a PNG
# of the image's name whose pixels are 0 for the first class, 1 for the second and so on, and 255
# where there is none. These are the lines to edit.
data_root = "data/my_masks/"
classes = ["background", "road", "building"]
image_suffix = ".jpg"
max_iters = 20000

# Full names, so that a copy of this file works anywhere.
_base_ = [
    "mmvmamba::_base_/models/upernet_vmamba.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmvmamba::_base_/schedules/vmamba_160k_ade20k.py",
]

# One GPU has no use for SyncBN.
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    # All of the segmentor starts from the official weights.
    backbone=dict(init_cfg=None),
    decode_head=dict(num_classes=len(classes), norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=len(classes), norm_cfg=norm_cfg),
)
common = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix=image_suffix,
    seg_map_suffix=".png",
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
        pipeline=train_pipeline,
        **common,
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        pipeline=test_pipeline,
        **common,
    )
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=max_iters, val_interval=2000)
# The warm-up is a fortieth of the training, whatever its length.
warm_up = max_iters // 40
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=warm_up),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=warm_up, end=max_iters),
]
# The schedule's rate is for 16 images a step, and follows the batch size and the number of GPUs.
auto_scale_lr = dict(enable=True)
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=2))

# VMamba-T's UperNet on ADE20K, without what is of other classes.
load_from = (
    "https://github.com/MzeroMiko/VMamba/releases/download/"
    "%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth"
)
load_ignore = ["decode_head.conv_seg", "auxiliary_head.conv_seg"]
