# Vanilla VMamba-B.
_base_ = "./vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(arch="vanilla-base"), head=dict(in_channels=1024))
