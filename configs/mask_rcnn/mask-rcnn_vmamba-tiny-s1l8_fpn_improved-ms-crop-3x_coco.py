# The 3x recipe with bfloat16, layer-wise decay and no weight decay on the state-space parameters;
# it needs a GPU that has bfloat16.
_base_ = [
    "./mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py",
    "../_base_/schedules/improved.py",
]

optim_wrapper = {{_base_.improved_optim_wrapper}}
