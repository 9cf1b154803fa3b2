# Table 14: mlp-ratio 3, ssm-ratio 1.5.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(mlp_ratio=3.0, ssm_ratio=1.5))
