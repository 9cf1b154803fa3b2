# The released detector's parts: ViTDet's pyramid from the last stream, and heads with more
# convolutions and layer normalisation.
_base_ = "./mask-rcnn_vmamba_fpn.py"

norm_cfg = dict(type="mmvmamba.LN2d")
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type="mmvmamba.VisionMamba",
        arch="base",
        img_size=1024,
        with_cls_token=False,
        rope=True,
        out_type="stream",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint={{_base_.vim_weights.base}}),
    ),
    neck=dict(
        _delete_=True,
        type="mmvmamba.SimpleFeaturePyramid",
        in_channels=768,
        out_channels=256,
    ),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
