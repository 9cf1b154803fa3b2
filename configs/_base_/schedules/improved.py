# What the improved recipes have in common, beside the schedule: bfloat16 (whose range needs no loss
# scaling), a learning rate that falls from block to block towards the image, and no weight decay on
# norms, biases and the state-space parameters. The rate 0.9 leaves the stem of VMamba-T a fifth.
improved_optim_wrapper = dict(
    _delete_=True,
    type="mmvmamba.AmpOptimWrapper",
    dtype="bfloat16",
    loss_scale=1.0,
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # As classifiers are trained; the paper's detectors and segmentors were not clipped.
    clip_grad=dict(max_norm=5.0),
    constructor="mmvmamba.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(
        layer_decay_rate=0.9,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            "op.A_logs": dict(decay_mult=0.0),
            "op.Ds": dict(decay_mult=0.0),
            "op.dt_projs_bias": dict(decay_mult=0.0),
        },
    ),
)
