# What the released configs have in common (state-spaces/s4, configs/experiment/s4nd): AdamW, 300
# epochs, cosine decay, no clipping. A kernel's steps, A and B do not decay; its C does.
_base_ = "./vmamba_300e_imagenet.py"

optim_wrapper = dict(
    clip_grad=None,
    paramwise_cfg=dict(
        custom_keys={name: dict(decay_mult=0.0) for name in (".inv_dt", ".A_real", ".A_imag", ".B")}
    ),
)
