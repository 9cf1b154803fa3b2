// What is needed of ONNX Runtime's C interface, which Python packages come without the headers of.
//
// It is a table of functions that only ever grows at its end, and a struct that a custom operator
// fills in, which grows likewise: both are described here by place, as of the version below.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmvmamba {
namespace onnxruntime {

// Of the interface: that of ONNX Runtime 1.17, the first with `parallel_for`.
constexpr uint32_t kVersion = 17;

struct Status;
struct Value;
struct Shape;
struct Context;
struct KernelInfo;
struct Options;
struct Domain;

constexpr int kFail = 1;
constexpr int kInvalidArgument = 2;
constexpr int kFloat = 1;

// Every function gives null, or what failed. Inputs are constants, which one function does not say.
class Api {
 public:
  Status* fail(int code, const char* message) const {
    return at<Status*(int, const char*)>(0)(code, message);
  }
  Status* create_domain(const char* name, Domain** out) const {
    return at<Status*(const char*, Domain**)>(26)(name, out);
  }
  Status* add_operator(Domain* domain, const struct CustomOp* op) const {
    return at<Status*(Domain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(Options* options, Domain* domain) const {
    return at<Status*(Options*, Domain*)>(28)(options, domain);
  }
  Status* data(const Value* value, float** out) const {
    return at<Status*(const Value*, void**)>(51)(value, reinterpret_cast<void**>(out));
  }
  Status* rank(const Shape* shape, size_t* out) const {
    return at<Status*(const Shape*, size_t*)>(61)(shape, out);
  }
  Status* sizes(const Shape* shape, int64_t* out, size_t rank) const {
    return at<Status*(const Shape*, int64_t*, size_t)>(62)(shape, out, rank);
  }
  Status* shape(const Value* value, Shape** out) const {
    return at<Status*(const Value*, Shape**)>(65)(value, out);
  }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return at<Status*(const Context*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* sizes, size_t rank,
                 Value** out) const {
    return at<Status*(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, sizes,
                                                                              rank, out);
  }
  void release(Shape* shape) const { at<void(Shape*)>(99)(shape); }
  // `size` is what there is room for, and then what there is.
  Status* integers(const KernelInfo* info, const char* name, int64_t* out, size_t* size) const {
    return at<Status*(const KernelInfo*, const char*, int64_t*, size_t*)>(163)(info, name, out,
                                                                               size);
  }
  // Calls `function` with every number below `total`, on the session's threads.
  Status* parallel_for(const Context* context, void (*function)(void*, size_t), size_t total,
                       void* data) const {
    using Function = Status*(const Context*, void (*)(void*, size_t), size_t, size_t, void*);
    return at<Function>(274)(context, function, total, 0, data);
  }

 private:
  template <typename Function>
  Function* at(size_t place) const {
    return reinterpret_cast<Function*>(reinterpret_cast<void* const*>(this)[place]);
  }
};

struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version)();
};

struct CustomOp {
  uint32_t version;
  void* (*create_without_status)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute_without_status)(void* kernel, Context*);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_inputs)(const CustomOp*);
  int (*homogeneous_inputs)(const CustomOp*);
  int (*variadic_outputs)(const CustomOp*);
  int (*homogeneous_outputs)(const CustomOp*);
  Status* (*create)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute)(void* kernel, Context*);
  Status* (*infer_shape)(const CustomOp*, void* context);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
};

}  // namespace onnxruntime
}  // namespace mmvmamba
