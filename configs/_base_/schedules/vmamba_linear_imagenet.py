# Linear tuning of the classifier's last layer. The paper gives no hyper-parameters; these are those
# of the tool that its authors released: 30 epochs of SGD, batch 4096, no weight decay, cosine decay.
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    # 8 GPUs x 64 images x 8 steps.
    accumulative_counts=8,
    optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=0.0),
    # The norm before the average keeps the pretrained values.
    paramwise_cfg=dict(custom_keys={"head.norm": dict(lr_mult=0.0)}),
)
param_scheduler = dict(
    type="CosineAnnealingLR", by_epoch=True, begin=0, end=30, convert_to_iter_based=True
)
auto_scale_lr = dict(base_batch_size=512)
