// What the host code of the CUDA kernels needs of CUDA's runtime, on a machine without a GPU.
#pragma once

#include <cstddef>

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
