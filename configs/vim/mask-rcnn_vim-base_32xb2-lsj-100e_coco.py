_base_ = [
    "../_base_/models/mask-rcnn_vim.py",
    "../_base_/schedules/vim_lsj-100e_coco.py",
]

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
