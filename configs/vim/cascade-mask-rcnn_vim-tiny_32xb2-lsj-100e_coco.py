_base_ = [
    "../_base_/models/cascade-mask-rcnn_vim.py",
    "../_base_/schedules/vim_lsj-100e_coco.py",
]
