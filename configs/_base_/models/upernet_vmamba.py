_base_ = ["mmseg::_base_/models/upernet_swin.py", "../weights.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VMamba",
        arch="tiny-s1l8",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vmamba_weights.tiny_s1l8}}),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
