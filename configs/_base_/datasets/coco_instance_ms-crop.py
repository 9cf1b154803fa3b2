# COCO with the multi-scale augmentation of DETR and Sparse R-CNN: half of the images are resized to
# one of eleven sizes, the other half are resized, cropped and resized.
_base_ = "mmdet::_base_/datasets/coco_instance.py"

resize = dict(
    type="RandomChoiceResize",
    scales=[(short_side, 1333) for short_side in range(480, 801, 32)],
    keep_ratio=True,
)
crop = [
    dict(
        type="RandomChoiceResize",
        scales=[(short_side, 1333) for short_side in (400, 500, 600)],
        keep_ratio=True,
    ),
    dict(
        type="RandomCrop",
        crop_type="absolute_range",
        crop_size=(384, 600),
        allow_negative_crop=True,
    ),
]
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args={{_base_.backend_args}}),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[resize], [*crop, resize]]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
