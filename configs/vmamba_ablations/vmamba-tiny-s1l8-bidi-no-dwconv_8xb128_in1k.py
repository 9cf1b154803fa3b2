# Table 10: bidi scan without the depth-wise convolution.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(scan="bidi", dwconv=False))
