# A detector for your own boxes in COCO's format: DATA_ROOT/train and DATA_ROOT/val hold the images,
# DATA_ROOT/annotations/{train,val}.json the boxes. These are the lines to edit; `classes` are the
# names of the annotations' categories.
data_root = "data/my_boxes/"
classes = ["cat", "dog", "horse"]
max_epochs = 12

# Full names, so that a copy of this file works anywhere.
_base_ = [
    "mmvmamba::_base_/models/faster-rcnn_vmamba_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/default_runtime.py",
    "mmvmamba::_base_/schedules/vmamba_1x_coco.py",
]

model = dict(
    # All of the detector starts from the official weights.
    backbone=dict(init_cfg=None),
    roi_head=dict(bbox_head=dict(num_classes=len(classes))),
)
metainfo = dict(classes=classes)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f"{data_root}/annotations/val.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs)
# The warm-up is a twentieth of the training, whatever its length.
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=0.001,
        by_epoch=True,
        begin=0,
        end=max_epochs / 20,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
# The schedule's rate is for 16 images a step, and follows the batch size and the number of GPUs.
auto_scale_lr = dict(enable=True)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best="auto"))

# VMamba-T's Mask R-CNN on COCO, without what is of other classes or of masks.
load_from = (
    "https://github.com/MzeroMiko/VMamba/releases/download/"
    "%23v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth"
)
load_ignore = ["roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head"]
