_base_ = "./classifier_vmamba.py"

model = dict(backbone=dict(_delete_=True, type="mmvmamba.S4NDViT", outnorm=False))
