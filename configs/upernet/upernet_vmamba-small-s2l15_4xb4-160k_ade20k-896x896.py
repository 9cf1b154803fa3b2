_base_ = [
    "../_base_/models/upernet_vmamba.py",
    "../_base_/datasets/ade20k_896x896.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/schedules/vmamba_160k_ade20k.py",
]

model = dict(
    data_preprocessor=dict(size=(896, 896)),
    backbone=dict(
        arch="small-s2l15",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint={{_base_.vmamba_weights.small_s2l15}}),
    ),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
