# Table 5, step (d): vanilla VMamba-T with MLPs, without the depth-wise convolution, two blocks a stage.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            dims=96,
            depths=(2, 2, 2, 2),
            d_state=16,
            ssm_ratio=2.0,
            gated=True,
            dwconv=False,
        )
    )
)
