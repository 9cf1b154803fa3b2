# The paper's recipe with bfloat16, layer-wise decay and no weight decay on the state-space
# parameters; it needs a GPU that has bfloat16.
_base_ = [
    "./upernet_vmamba-tiny-s1l8_4xb4-160k_ade20k-512x512.py",
    "../_base_/schedules/improved.py",
]

optim_wrapper = {{_base_.improved_optim_wrapper}}
