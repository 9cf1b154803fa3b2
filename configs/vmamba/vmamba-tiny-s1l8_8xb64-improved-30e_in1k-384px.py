# The official 224-pixel weights fine-tuned at 384 pixels, with bfloat16, layer-wise decay and no
# weight decay on the state-space parameters; it needs a GPU that has bfloat16. Layer-wise decay is
# for weights that are good already, so this is not a recipe from scratch.
_base_ = [
    "./vmamba-tiny-s1l8_8xb128_in1k.py",
    "../_base_/schedules/improved.py",
    "../_base_/weights.py",
]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=384, backend="pillow", interpolation="bicubic"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(384, 384), backend="pillow", interpolation="bicubic"),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = {{_base_.improved_optim_wrapper}}
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=2),
]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
load_from = {{_base_.vmamba_weights.tiny_s1l8}}
