// The part of Metal that the logit kernel needs, on a CPU.
//
// Every GPU thread is a fiber. A SIMD function waits for the live lanes of its SIMD group,
// threadgroup_barrier for all threads of the threadgroup. It is an error if lanes wait at different
// source lines, or if threads return while others wait at a barrier. Threadgroup memory is filled
// with 0xFF (NaN) before each threadgroup. Not modelled: GPU rounding, denormals, memory order.
#pragma once
#ifdef __APPLE__
// Without the first, <ucontext.h> is an error there; the second keeps what the first hides.
#define _XOPEN_SOURCE 700
#define _DARWIN_C_SOURCE
#endif
// C headers only, so that no C++ library has to be found or built.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#undef isnan

#ifdef __clang__
#define device __attribute__((address_space(1)))
#define SHIM_CONSTANT __attribute__((address_space(2)))
#define SHIM_THREADGROUP __attribute__((address_space(3)))
typedef __bf16 bfloat16_t;
// Some compilers' run-time libraries lack it.
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  word += value != value ? 0 : 0x7FFF + ((word >> 16) & 1);
  const uint16_t bits = uint16_t(word >> 16);
  __bf16 result;
  memcpy(&result, &bits, 2);
  return result;
}
#else
#define device
#define SHIM_CONSTANT
#define SHIM_THREADGROUP
struct bfloat16_t {
  uint16_t bits;
  // As in Metal, a float is not converted to a bfloat implicitly.
  explicit bfloat16_t(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    word += value != value ? 0 : 0x7FFF + ((word >> 16) & 1);
    bits = uint16_t(word >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};
#endif
#define constant SHIM_CONSTANT
typedef _Float16 float16_t;
typedef _Float16 half;
typedef unsigned int uint;
typedef unsigned short ushort;
struct uint3 { uint x, y, z; };

namespace shim {

constexpr uint LANES = 32;
constexpr uint MAX_THREADS = 1024;
constexpr size_t STACK = 64 * 1024;
constexpr size_t ARENA = 32 * 1024;
enum State { READY, AT_SIMD, AT_BARRIER, DONE };

struct Fiber {
  jmp_buf self;
  State state;
  bool is_started;
  int line;
  uint64_t operand, result;
  uint argument;
  int operation;
};

struct Machine {
  Fiber fibers[MAX_THREADS];
  char *stacks;
  char arena[ARENA];
  jmp_buf scheduler;
  ucontext_t launcher, launched;
  uint current;
  uint group_x, group_y, groups_x, threads;
  void (*body)();
  char error[256];
};
static Machine machine;

enum Operation { SUM, MAX, MIN, ANY, SHUFFLE, SHUFFLE_UP };

inline void enter() {
  machine.body();
  machine.fibers[machine.current].state = DONE;
  _longjmp(machine.scheduler, 1);
}

[[gnu::noinline]] inline void yield_fiber() {
  Fiber &fiber = machine.fibers[machine.current];
  if (_setjmp(fiber.self) == 0) _longjmp(machine.scheduler, 1);
}

template <typename U> uint64_t bits_of(U value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename U> U of_bits(uint64_t bits) {
  U value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename U> U run_simd(Operation operation, U value, uint argument, int line) {
  Fiber &fiber = machine.fibers[machine.current];
  fiber.operand = bits_of(value);
  fiber.argument = argument;
  fiber.operation = operation * 16 + int(sizeof(U)) + (U(0.5f) != U(0) ? 8 : 0);
  fiber.line = line;
  fiber.state = AT_SIMD;
  yield_fiber();
  return of_bits<U>(machine.fibers[machine.current].result);
}

template <typename U> void reduce(Fiber *lanes, Operation operation) {
  // A butterfly over the live lanes, in the order in which the hardware adds.
  U values[LANES];
  bool live[LANES];
  for (uint i = 0; i < LANES; i++) {
    live[i] = lanes[i].state == AT_SIMD;
    values[i] = live[i] ? of_bits<U>(lanes[i].operand) : U(0);
  }
  for (uint step = 1; step < LANES; step *= 2) {
    U next[LANES];
    bool next_live[LANES];
    for (uint i = 0; i < LANES; i++) {
      const uint j = i ^ step;
      next_live[i] = live[i] || live[j];
      const U a = values[i], b = values[j];
      if (!live[i] || !live[j]) next[i] = live[i] ? a : b;
      else if (operation == SUM) next[i] = U(a + b);
      else if (operation == MAX) next[i] = a > b ? a : b;
      else next[i] = a < b ? a : b;
    }
    memcpy(values, next, sizeof values);
    memcpy(live, next_live, sizeof live);
  }
  for (uint i = 0; i < LANES; i++) lanes[i].result = bits_of(values[i]);
}

inline void complete(Fiber *lanes) {
  const int operation = lanes[0].operation / 16;
  const bool floating = lanes[0].operation & 8;
  if (operation <= MIN) {
    if (floating) reduce<float>(lanes, Operation(operation));
    else reduce<uint>(lanes, Operation(operation));
  } else {
    bool any = false;
    for (uint i = 0; i < LANES; i++) any = any || (lanes[i].state == AT_SIMD && lanes[i].operand);
    for (uint i = 0; i < LANES; i++) {
      // The value of an absent lane is undefined in Metal; here all its bits are set.
      const uint from = operation == SHUFFLE ? lanes[i].argument : i - lanes[i].argument;
      const bool is_live = from < LANES && lanes[from].state == AT_SIMD;
      if (operation == ANY) lanes[i].result = any;
      else if (operation == SHUFFLE_UP && i < lanes[i].argument) lanes[i].result = lanes[i].operand;
      else lanes[i].result = is_live ? lanes[from].operand : ~uint64_t(0);
    }
  }
  for (uint i = 0; i < LANES; i++)
    if (lanes[i].state == AT_SIMD) lanes[i].state = READY;
}

// Completes the SIMD function that all live lanes wait at; sets the error when lanes diverge.
inline bool try_complete_simd(Fiber *lanes) {
  int line = 0, waiting = 0, elsewhere = 0;
  for (uint i = 0; i < LANES; i++) {
    if (lanes[i].state == READY) return false;
    if (lanes[i].state == AT_BARRIER) elsewhere = lanes[i].line;
    if (lanes[i].state != AT_SIMD) continue;
    waiting++;
    if (line && line != lanes[i].line) elsewhere = lanes[i].line;
    line = lanes[i].line;
  }
  if (!waiting) return false;
  // Lanes that returned take no part; `lanes[0]` holds the operation, so it must be live.
  if (elsewhere || lanes[0].state == DONE) {
    snprintf(machine.error, sizeof machine.error,
                  "lanes of a SIMD group diverge: lines %d and %d", line, elsewhere);
    return false;
  }
  complete(lanes);
  return true;
}

inline bool try_release_barrier() {
  uint waiting = 0, done = 0, line = 0;
  for (uint i = 0; i < machine.threads; i++) {
    const Fiber &fiber = machine.fibers[i];
    if (fiber.state == AT_BARRIER) waiting++, line = uint(fiber.line);
    if (fiber.state == DONE) done++;
  }
  if (waiting && done)
    snprintf(machine.error, sizeof machine.error,
                  "%u threads returned while others wait at the barrier of line %u", done, line);
  if (!waiting || done || waiting < machine.threads) return false;
  for (uint i = 0; i < machine.threads; i++) machine.fibers[i].state = READY;
  return true;
}

inline void start(uint index) {
  Fiber &fiber = machine.fibers[index];
  fiber.is_started = true;
  getcontext(&machine.launched);
  machine.launched.uc_stack.ss_sp = machine.stacks + index * STACK;
  machine.launched.uc_stack.ss_size = STACK;
  machine.launched.uc_link = nullptr;
  makecontext(&machine.launched, enter, 0);
  setcontext(&machine.launched);
}

[[gnu::noinline]] inline void resume(uint index) {
  machine.current = index;
  if (_setjmp(machine.scheduler)) return;
  Fiber &fiber = machine.fibers[index];
  if (fiber.is_started) _longjmp(fiber.self, 1);
  start(index);
}

inline uint next_random(uint &state) {
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

// `schedule` is the order in which ready threads run: 0 forward, 1 backward, else a random seed.
inline bool run_threadgroup(uint schedule) {
  uint random = schedule * 2654435761u + 1;
  for (;;) {
    bool ran = false;
    const uint first = schedule < 2 ? 0 : next_random(random) % machine.threads;
    for (uint i = 0; i < machine.threads; i++) {
      uint index = (i + first) % machine.threads;
      if (schedule == 1) index = machine.threads - 1 - index;
      if (machine.fibers[index].state != READY) continue;
      resume(index);
      ran = true;
      Fiber *lanes = &machine.fibers[index / LANES * LANES];
      if (try_complete_simd(lanes) && schedule < 2) break;
      if (machine.error[0]) return false;
    }
    if (try_release_barrier()) continue;
    if (machine.error[0]) return false;
    if (!ran) return true;
  }
}

inline const char *run(void (*body)(), const uint *grid, const uint *threads, uint schedule) {
  machine.body = body;
  machine.threads = threads[0];
  machine.groups_x = grid[0] / threads[0];
  machine.error[0] = 0;
  if (!machine.stacks) machine.stacks = (char *)malloc(MAX_THREADS * STACK);
  const uint count = machine.groups_x * grid[1];
  for (uint i = 0; i < count; i++) {
    const uint group = schedule == 1 ? count - 1 - i : i;
    machine.group_x = group % machine.groups_x;
    machine.group_y = group / machine.groups_x;
    memset(machine.arena, 0xFF, ARENA);
    for (uint j = 0; j < machine.threads; j++) {
      machine.fibers[j].state = READY;
      machine.fibers[j].is_started = false;
    }
    if (!run_threadgroup(schedule)) break;
  }
  return machine.error;
}

// The address of a threadgroup array: the same for every thread of the threadgroup.
template <size_t OFFSET, size_t BYTES> void *threadgroup_memory() {
  static_assert(OFFSET + BYTES <= ARENA, "more threadgroup memory than Metal has");
  return machine.arena + OFFSET;
}

}  // namespace shim

#define SHIM_LINE int line = __builtin_LINE()
namespace metal {
inline float min(float a, float b) { return a < b || b != b ? a : b; }
inline float max(float a, float b) { return a > b || b != b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline bool isnan(float a) { return a != a; }
namespace precise {
inline float exp2(float a) { return exp2f(a); }
inline float log(float a) { return logf(a); }
}
enum class mem_flags { mem_none, mem_threadgroup, mem_device };
inline float simd_sum(float a, SHIM_LINE) { return shim::run_simd(shim::SUM, a, 0, line); }
inline uint simd_sum(uint a, SHIM_LINE) { return shim::run_simd(shim::SUM, a, 0, line); }
inline float simd_max(float a, SHIM_LINE) { return shim::run_simd(shim::MAX, a, 0, line); }
inline uint simd_max(uint a, SHIM_LINE) { return shim::run_simd(shim::MAX, a, 0, line); }
inline float simd_min(float a, SHIM_LINE) { return shim::run_simd(shim::MIN, a, 0, line); }
inline uint simd_min(uint a, SHIM_LINE) { return shim::run_simd(shim::MIN, a, 0, line); }
inline bool simd_any(bool a, SHIM_LINE) { return shim::run_simd(shim::ANY, uint(a), 0, line); }
inline float simd_shuffle(float a, ushort from, SHIM_LINE) {
  return shim::run_simd(shim::SHUFFLE, a, from, line);
}
inline uint simd_shuffle(uint a, ushort from, SHIM_LINE) {
  return shim::run_simd(shim::SHUFFLE, a, from, line);
}
inline float simd_shuffle_up(float a, ushort by, SHIM_LINE) {
  return shim::run_simd(shim::SHUFFLE_UP, a, by, line);
}
inline uint simd_shuffle_up(uint a, ushort by, SHIM_LINE) {
  return shim::run_simd(shim::SHUFFLE_UP, a, by, line);
}
inline void threadgroup_barrier(mem_flags, SHIM_LINE) {
  shim::Fiber &fiber = shim::machine.fibers[shim::machine.current];
  fiber.line = line;
  fiber.state = shim::AT_BARRIER;
  shim::yield_fiber();
}
}  // namespace metal
using namespace metal;
