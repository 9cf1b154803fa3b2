# Vim-B. No recipe of it has been released: this is Vim-S', with the drop path rate that vim/main.py
# has where none is given.
_base_ = "./vim-small_8xb64_in1k.py"

model = dict(backbone=dict(arch="base", drop_path_rate=0.1), head=dict(in_channels=768))
