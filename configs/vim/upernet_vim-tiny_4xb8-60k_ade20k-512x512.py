_base_ = [
    "../_base_/models/upernet_vim.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/schedules/vim_60k_ade20k.py",
]

train_dataloader = dict(batch_size=8)
