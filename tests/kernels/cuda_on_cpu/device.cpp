// The device: fibers, shared memory, and how many multiprocessors it says it has.

// Its longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <exception>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr size_t kSharedMemory = 48 << 10;
constexpr size_t kStack = 256 << 10;
constexpr unsigned kWarp = 32;

// Not a number in any floating-point type: what is read before it is written shows.
constexpr unsigned char kPoison = 0xff;

int multiprocessors = 1;
bool last_block_first = false;

// A context makes a stack; after that fibers take turns by jumps, which do not call the kernel of
// the operating system.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(kStack);
  dim3 thread;
  size_t meetings = 0;
  size_t exchanges = 0;
  bool started = false;
  bool done = false;
};

std::array<Fiber, kWarp> fibers;
Fiber* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* work = nullptr;
std::exception_ptr failure;

// From a fiber back to the scheduler.
void leave() {
  if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}

// Once a fiber: it runs one kernel after the other.
void fiber_main() {
  for (;;) {
    try {
      (*work)();
    } catch (...) {
      failure = std::current_exception();
    }
    running->done = true;
    leave();
  }
}

// From the scheduler into a fiber, until that leaves.
void enter(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

// Fibers that stopped within a kernel start anew.
[[noreturn]] void fail(std::exception_ptr reason) {
  for (Fiber& fiber : fibers) fiber.started = false;
  std::rethrow_exception(reason);
}

void run_warp(const dim3& threads, unsigned first, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = dim3((first + i) % threads.x, (first + i) / threads.x);
    fiber.meetings = fiber.exchanges = 0;
    fiber.done = false;
  }
  while (!fibers[0].done) {
    for (unsigned i = 0; i < count; ++i) {
      running = &fibers[i];
      cuda_on_cpu::thread = running->thread;
      enter(*running);
      if (failure) fail(std::exchange(failure, nullptr));
      if (running->done != fibers[0].done || running->meetings != fibers[0].meetings) {
        fail(std::make_exception_ptr(
            std::runtime_error("threads of a warp do not meet at the same primitives")));
      }
    }
  }
}

}  // namespace

namespace mmvmamba {
namespace cuda {

float4 shared_memory[kSharedMemory / sizeof(float4)];

}  // namespace cuda
}  // namespace mmvmamba

namespace cuda_on_cpu {

dim3 thread, block;

void meet() {
  ++running->meetings;
  leave();
}

void* mailbox(unsigned lane, bool other) {
  static double places[2][kWarp];
  return &places[other][lane];
}

bool turn() { return running->exchanges++ % 2; }

cudaError_t run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& kernel) {
  if (shared > kSharedMemory) return cudaErrorInvalidConfiguration;
  auto* memory = reinterpret_cast<unsigned char*>(mmvmamba::cuda::shared_memory);
  work = &kernel;
  for (unsigned i = 0; i < blocks.x; ++i) {
    block = dim3(last_block_first ? blocks.x - 1 - i : i);
    std::fill_n(memory, kSharedMemory, kPoison);
    const unsigned count = threads.x * threads.y;
    for (unsigned first = 0; first < count; first += kWarp) {
      run_warp(threads, first, std::min(kWarp, count - first));
    }
    if (!std::all_of(memory + shared, memory + kSharedMemory,
                     [](unsigned char byte) { return byte == kPoison; })) {
      throw std::runtime_error("a block wrote behind its shared memory");
    }
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t) { return "launch refused"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessors;
  return cudaSuccess;
}

// For the tests, which call it by its name.
extern "C" __attribute__((visibility("default"))) void set_device(int count, bool order) {
  multiprocessors = count;
  last_block_first = order;
}
