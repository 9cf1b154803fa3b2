# Table 10: unidi scan without the depth-wise convolution.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(scan="unidi", dwconv=False))
