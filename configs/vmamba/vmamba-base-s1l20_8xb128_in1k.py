# VMamba-B[s1l20].
_base_ = "./vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(backbone=dict(arch="base-s1l20"), head=dict(in_channels=1024))
