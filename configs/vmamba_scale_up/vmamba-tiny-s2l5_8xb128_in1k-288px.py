# Table 9: VMamba-T[s2l5], trained at 224 pixels, tested at 288.
_base_ = "./vmamba-tiny-s1l8_8xb128_in1k-288px.py"

model = dict(backbone=dict(arch="tiny-s2l5"))
