# Table 12: d_state 8, ssm-ratio 1.5.
_base_ = "../vmamba/vmamba-tiny-s2l5_8xb128_in1k.py"

model = dict(backbone=dict(d_state=8, ssm_ratio=1.5))
