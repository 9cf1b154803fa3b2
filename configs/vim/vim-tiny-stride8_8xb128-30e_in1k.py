# Vim-Ti fine-tuned at finer granularity, with the released recipe (vim/scripts/ft-vim-t.sh):
# patches that overlap by half, 30 epochs at 1e-5 for batch 1024 (5e-6 for 512 in the script), which
# is also the rate that warm-up begins and the schedule ends with, and nearly no weight decay.
_base_ = ["./vim-tiny_8xb128_in1k.py", "../_base_/weights.py"]

model = dict(
    backbone=dict(stride=8, drop_path_rate=0.0),
    init_cfg=dict(_delete_=True, type="Pretrained", checkpoint={{_base_.vim_weights.tiny}}),
)
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=True, begin=0, end=30)]
