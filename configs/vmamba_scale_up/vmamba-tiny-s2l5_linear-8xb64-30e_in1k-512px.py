# Table 9: VMamba-T[s2l5]'s last layer tuned at 512 pixels.
_base_ = "./vmamba-tiny-s1l8_linear-8xb64-30e_in1k-512px.py"

model = dict(backbone=dict(arch="tiny-s2l5"))
load_from = {{_base_.vmamba_weights.tiny_s2l5}}
