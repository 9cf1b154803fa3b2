# Table 11: random initialisation of the state-space parameters.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(init="rand"))
