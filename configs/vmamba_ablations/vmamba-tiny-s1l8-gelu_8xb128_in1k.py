# Table 15: GELU in the mixer.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(act="gelu"))
