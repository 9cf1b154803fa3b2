_base_ = "./cascade-mask-rcnn_vim-tiny_32xb2-lsj-100e_coco.py"

model = dict(
    backbone=dict(arch="small", init_cfg=dict(checkpoint={{_base_.vim_weights.small}})),
    neck=dict(in_channels=384),
)
