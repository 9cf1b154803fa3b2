# ImageNet, tested at 288 pixels with the crop ratio of 224 out of 256.
_base_ = "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py"

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="ResizeEdge",
        scale=329,
        edge="short",
        backend="pillow",
        interpolation="bicubic",
    ),
    dict(type="CenterCrop", crop_size=288),
    dict(type="PackInputs"),
]
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
