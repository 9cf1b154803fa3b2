# The official ImageNet weights that detectors and segmentors start from, by architecture.
vmamba_releases = "https://github.com/MzeroMiko/VMamba/releases/download/"
vmamba_weights = dict(
    vanilla_tiny=vmamba_releases + "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth",
    vanilla_small=vmamba_releases + "%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth",
    vanilla_base=vmamba_releases + "%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth",
    tiny_s2l5=vmamba_releases + "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth",
    tiny_s1l8=vmamba_releases + "%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth",
    small_s2l15=vmamba_releases + "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth",
    small_s1l20=vmamba_releases + "%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth",
    base_s2l15=vmamba_releases + "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth",
    base_s1l20=vmamba_releases + "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth",
)
# Vim's, whose names say what they reach on ImageNet; `_ft` at finer granularity.
vim_releases = "https://huggingface.co/hustvl/"
vim_weights = dict(
    tiny=vim_releases + "Vim-tiny-midclstok/resolve/main/vim_t_midclstok_76p1acc.pth",
    tiny_stride8=vim_releases + "Vim-tiny-midclstok/resolve/main/vim_t_midclstok_ft_78p3acc.pth",
    small=vim_releases + "Vim-small-midclstok/resolve/main/vim_s_midclstok_80p5acc.pth",
    small_stride8=vim_releases + "Vim-small-midclstok/resolve/main/vim_s_midclstok_ft_81p6acc.pth",
    base=vim_releases + "Vim-base-midclstok/resolve/main/vim_b_midclstok_81p9acc.pth",
)
