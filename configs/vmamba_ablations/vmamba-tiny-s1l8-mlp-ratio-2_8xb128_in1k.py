# Table 14: mlp-ratio 2, ssm-ratio 2.5.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(mlp_ratio=2.0, ssm_ratio=2.5))
