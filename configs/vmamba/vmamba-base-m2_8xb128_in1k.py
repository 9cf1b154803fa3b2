# VMamba-B with the Mamba-2 mixer.
_base_ = "./vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(arch="base-m2"), head=dict(in_channels=1024))
