# Vim-S fine-tuned at finer granularity, as Vim-Ti (vim/scripts/ft-vim-s.sh).
_base_ = "./vim-tiny-stride8_8xb128-30e_in1k.py"

model = dict(
    backbone=dict(arch="small"),
    head=dict(in_channels=384),
    init_cfg=dict(checkpoint={{_base_.vim_weights.small}}),
)
