_base_ = "./classifier_vmamba.py"

model = dict(
    # The last map is averaged before its norm.
    backbone=dict(_delete_=True, type="mmvmamba.S4NDConvNeXt", gap_before_final_norm=True),
    head=dict(
        _delete_=True,
        type="LinearClsHead",
        num_classes=1000,
        in_channels=768,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        cal_acc=False,
    ),
)
