"""Models out of Python: to ONNX, OpenVINO and `.pt2` files, and back for a look at them."""
