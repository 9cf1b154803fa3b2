# As Mask R-CNN with Vim.
_base_ = "./cascade-mask-rcnn_vmamba_fpn.py"

norm_cfg = dict(type="mmvmamba.LN2d")
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VisionMamba",
        arch="tiny",
        img_size=1024,
        with_cls_token=False,
        rope=True,
        out_type="stream",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vim_weights.tiny}}),
    ),
    neck=dict(
        _delete_=True,
        type="mmvmamba.SimpleFeaturePyramid",
        in_channels=192,
        out_channels=256,
    ),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared4Conv1FCBBoxHead",
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=norm_cfg,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder",
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=[1 / scale, 1 / scale, 2 / scale, 2 / scale],
                ),
                reg_class_agnostic=True,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for scale in (10, 20, 30)
        ],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
