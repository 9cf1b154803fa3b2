# Table 12: d_state 4, ssm-ratio 2.0.
_base_ = "../vmamba/vmamba-tiny-s2l5_8xb128_in1k.py"

model = dict(backbone=dict(d_state=4))
