_base_ = "./classifier_vmamba.py"

model = dict(
    backbone=dict(_delete_=True, type="mmvmamba.NAT", arch="tiny", out_indices=(3,), outnorm=False),
    head=dict(in_channels=512),
)
