"""The depth-wise 3x3 convolution with bias and activation."""
