# What the released configs have: AdamW, 300 epochs of which 20 warm up, cosine decay. The state-space
# models' steps, A and B learn at 1e-3 whatever the rate of the rest, and nothing of a kernel decays.
_base_ = "./vmamba_300e_imagenet.py"

optim_wrapper = dict(
    clip_grad=None,
    paramwise_cfg=dict(
        custom_keys={
            name: dict(lr_mult=1.0, decay_mult=0.0)
            for name in (".inv_dt", ".A_real", ".A_imag", ".B")
        }
    ),
)
