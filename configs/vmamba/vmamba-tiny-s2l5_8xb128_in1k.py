# VMamba-T[s2l5].
_base_ = "./vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(arch="tiny-s2l5"))
