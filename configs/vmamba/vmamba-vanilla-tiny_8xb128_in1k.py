# Vanilla VMamba-T.
_base_ = "./vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(arch="vanilla-tiny"))
