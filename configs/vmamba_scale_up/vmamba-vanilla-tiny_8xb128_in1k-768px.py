# Table 9: vanilla VMamba-T, trained at 224 pixels, tested at 768.
_base_ = "./vmamba-tiny-s1l8_8xb128_in1k-768px.py"

model = dict(backbone=dict(arch="vanilla-tiny"))
