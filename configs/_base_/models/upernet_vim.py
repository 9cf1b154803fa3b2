# The released segmentor: maps of four blocks become a pyramid, and UperNet is as wide as a token.
_base_ = ["mmseg::_base_/models/upernet_swin.py", "../weights.py"]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VisionMamba",
        arch="tiny",
        img_size=512,
        with_cls_token=False,
        out_type="mixer",
        out_indices=(5, 11, 17, 23),
        fpn=True,
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vim_weights.tiny}}),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192, num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
