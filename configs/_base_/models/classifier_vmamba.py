_base_ = "mmpretrain::_base_/models/swin_transformer/tiny_224.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        out_indices=(3,),
        # The head has the norm.
        outnorm=False,
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
