# The small VMamba of the sample configs: 1.3 million parameters, VMamba-T's kind of blocks.
arch = dict(
    dims=32,
    depths=(1, 1, 2, 1),
    d_state=1,
    ssm_ratio=1.0,
    mlp_ratio=3.0,
    gated=False,
    dwconv_bias=False,
    stem="v2",
    downsample="v3",
    drop_path_rate=0.05,
)
