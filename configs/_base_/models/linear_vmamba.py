# A classifier of which only the last linear layer learns.
_base_ = ["./classifier_vmamba.py", "../weights.py"]

model = dict(
    backbone=dict(frozen_stages=4),
    head=dict(loss=dict(_delete_=True, type="mmpretrain.CrossEntropyLoss", loss_weight=1.0)),
    train_cfg=None,
)
# The head's norm is part of what the features are; see the schedule.
load_ignore = ["head.head"]
