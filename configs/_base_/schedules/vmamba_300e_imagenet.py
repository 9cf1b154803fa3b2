# The paper's ImageNet schedule: Swin Transformer's, with an exponential moving average of the
# weights (0.9999). AdamW at 1e-3 for batch 1024 (8 GPUs x 128), 300 epochs of which 20 warm up,
# cosine decay, no weight decay on norms and biases.
_base_ = "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py"

optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
custom_hooks = [dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
