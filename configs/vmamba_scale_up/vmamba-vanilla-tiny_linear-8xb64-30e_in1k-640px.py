# Table 9: vanilla VMamba-T's last layer tuned at 640 pixels.
_base_ = "./vmamba-tiny-s1l8_linear-8xb64-30e_in1k-640px.py"

model = dict(backbone=dict(arch="vanilla-tiny"))
load_from = {{_base_.vmamba_weights.vanilla_tiny}}
