# Table 13: ssm-ratio 1 with five blocks in the third stage.
_base_ = "../vmamba/vmamba-tiny-s2l5_8xb128_in1k.py"

model = dict(backbone=dict(ssm_ratio=1.0))
