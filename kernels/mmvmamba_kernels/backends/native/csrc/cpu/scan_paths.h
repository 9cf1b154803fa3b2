// The paths of a scan by their codes, and sizes that every caller of the kernels needs.
#pragma once

#include "../scan_params.h"

namespace mmvmamba {

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

inline Path make_path(int64_t code, int64_t height, int64_t width) {
  const bool column_major = code & kColumnMajor;
  const int64_t lines = column_major ? width : height;
  const int64_t line_length = column_major ? height : width;
  const int64_t line_stride = column_major ? 1 : width;
  const int64_t step = column_major ? width : 1;
  const bool per_line = code & kPerLine;
  Path path;
  path.sequences = per_line ? lines : 1;
  path.length = per_line ? line_length : lines * line_length;
  path.sequence_stride = per_line ? line_stride : 0;
  path.inner = line_length;
  path.inner_stride = step;
  path.outer_stride = line_stride;
  path.reverse = code & kReverse;
  path.list = nullptr;
  return path;
}

}  // namespace mmvmamba
