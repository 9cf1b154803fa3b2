# Table 5, step (e): step (d) without the gate, ssm-ratio 1, five blocks in the third stage.
_base_ = "../vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            dims=96,
            depths=(2, 2, 5, 2),
            d_state=16,
            ssm_ratio=1.0,
            gated=False,
            dwconv=False,
        )
    )
)
