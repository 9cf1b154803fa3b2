# The 3x recipe with bfloat16, layer-wise decay and no weight decay on the state-space parameters;
# it needs a GPU that has bfloat16. Boxes and RoIAlign stay in float32.
_base_ = [
    "./mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py",
    "../_base_/schedules/improved.py",
]

model = dict(
    rpn_head=dict(type="mmvmamba.Float32RPNHead"),
    roi_head=dict(
        bbox_roi_extractor=dict(type="mmvmamba.Float32RoIExtractor"),
        mask_roi_extractor=dict(type="mmvmamba.Float32RoIExtractor"),
    ),
)
optim_wrapper = {{_base_.improved_optim_wrapper}}
