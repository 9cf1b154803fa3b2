# Table 9: vanilla VMamba-T's last layer tuned at 768 pixels.
_base_ = "./vmamba-tiny-s1l8_linear-8xb64-30e_in1k-768px.py"

model = dict(backbone=dict(arch="vanilla-tiny"))
load_from = {{_base_.vmamba_weights.vanilla_tiny}}
