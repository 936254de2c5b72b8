// Runs a kernel on the CPU: one fiber per CUDA thread, block after block, on one OS thread. A fiber runs until it must
// wait for others, so a kernel that forgets a barrier reads what has not been written yet in one of the orders.
#include "simt.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN(...) __VA_ARGS__
#else
#define SIMT_ASAN(...)
#endif

namespace simt {
namespace {

// A context is a saved stack pointer; the callee-saved registers lie on the stack it points to.
#if defined(__x86_64__)
using Context = void*;
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void swap_context(Context& save, Context& load) { simt_switch(&save, load); }
void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;  // leaves the stack 8 mod 16 at entry, as after a call
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
void swap_context(Context& save, Context& load) { swapcontext(&save, &load); }
void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, entry, 0);
}
#endif

constexpr size_t kStack = SIMT_ASAN(4 *) 64 * 1024;

struct Copy {  // a cp.async on its way
  void* target;
  int bytes, group;
  char data[16];
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  uint3 index;
  int warp, lane;
  bool done;
  const char* waits_at;  // name of the collective or barrier, null while it can run
  Site site;
  unsigned mask;  // of the collective; 0: a barrier
  detail::Combine combine;
  void* value;
  int groups;  // committed cp.async groups
  std::deque<Copy> copies;
  SIMT_ASAN(void* fake_stack = nullptr;)
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
struct Shared {
  std::unique_ptr<char, Free> memory;
  size_t bytes;
};

std::mutex one_launch;
std::string message;
Context scheduler;
Fiber* current = nullptr;
std::deque<Fiber> pool;  // stacks outlive a launch; a deque keeps addresses
std::vector<unsigned> ready;  // one mask of runnable lanes per warp
int threads, alive, arrived, folded;
Site first_arrival;  // at the barrier under way
std::map<std::pair<std::string, int>, Shared> statics;
Shared dynamic;
void (*thread_main)(void*);
void* thread_context;
std::mt19937_64 dice;
SIMT_ASAN(const void* scheduler_stack; size_t scheduler_stack_bytes;)

std::ostream& operator<<(std::ostream& out, Site site) { return out << site.file << ":" << site.line; }
std::ostream& operator<<(std::ostream& out, uint3 v) { return out << "(" << v.x << "," << v.y << "," << v.z << ")"; }

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

bool same(Site a, Site b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

void to_scheduler(bool for_ever = false) {
  Fiber* self = current;
  SIMT_ASAN(void** kept = for_ever ? nullptr : &self->fake_stack;
            __sanitizer_start_switch_fiber(kept, scheduler_stack, scheduler_stack_bytes);)
  (void)for_ever;
  swap_context(self->context, scheduler);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);)
}

void entry() {
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);)
  thread_main(thread_context);
  current->done = true;
  --alive;
  ready[current->warp] &= ~(1u << current->lane);
  to_scheduler(true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  SIMT_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);)
  swap_context(scheduler, fiber.context);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
  current = nullptr;
}

void block_here(const char* name, Site where) {
  current->waits_at = name;
  current->site = where;
  ready[current->warp] &= ~(1u << current->lane);
}

void wake(Fiber& fiber) {
  fiber.waits_at = nullptr;
  ready[fiber.warp] |= 1u << fiber.lane;
}

void start(Fiber& fiber, int number) {
  if (!fiber.stack) {
    const size_t page = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // running over the end faults instead of eating a neighbour's stack
    fiber.stack = static_cast<char*>(memory) + page;
  }
  SIMT_ASAN(__asan_unpoison_memory_region(fiber.stack, kStack);)  // frames of an aborted launch never returned
  const unsigned n = number;
  fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
  fiber.warp = number / 32;
  fiber.lane = number % 32;
  fiber.done = false;
  fiber.waits_at = nullptr;
  fiber.groups = 0;
  fiber.copies.clear();
  make_context(fiber.context, fiber.stack, kStack, entry);
}

Shared allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes)) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);  // NaN and -1: a read of what was never written shows
  return {std::unique_ptr<char, Free>(static_cast<char*>(memory)), bytes};
}

int pick(unsigned lanes) {
  if (options().order == Order::kForward) return __builtin_ctz(lanes);
  if (options().order == Order::kReverse) return 31 - __builtin_clz(lanes);
  for (int skip = dice() % __builtin_popcount(lanes); skip > 0; --skip) lanes &= lanes - 1;
  return __builtin_ctz(lanes);
}

// One warp runs until all its lanes wait. Fair turns would keep the warps in step and hide missing barriers; only the
// random order hands over early now and then.
void run_block() {
  const int warps = static_cast<int>(ready.size());
  int idle = 0;
  for (int turn = 0; alive > 0 && message.empty(); ++turn) {
    int warp = turn % warps;
    if (options().order == Order::kReverse) warp = warps - 1 - warp;
    if (options().order == Order::kRandom && idle == 0) warp = dice() % warps;
    idle = ready[warp] ? 0 : idle + 1;
    if (idle > 2 * warps) {
      message = "deadlock";
      for (int i = 0, shown = 0; i < threads && shown < 4; ++i) {
        const Fiber& f = pool[i];
        if (f.done) continue;
        message += text(shown++ ? "; " : ": block ", blockIdx, " thread ", f.index, " in ", f.waits_at, " at ", f.site);
      }
    }
    while (ready[warp] && message.empty()) {
      resume(pool[32 * warp + pick(ready[warp])]);
      if (options().order == Order::kRandom && dice() % 64 == 0) break;
    }
  }
}

void land(Fiber& fiber, int oldest_left) {
  while (!fiber.copies.empty() && fiber.copies.front().group < oldest_left) {
    const Copy& copy = fiber.copies.front();
    std::memcpy(copy.target, copy.data, copy.bytes);
    fiber.copies.pop_front();
  }
}

}  // namespace

Options& options() {
  static Options chosen;
  return chosen;
}

const std::string& error() { return message; }

namespace detail {

void fail(const std::string& what) {
  message = text(what, " [block ", blockIdx, " thread ", current->index, "]");
  to_scheduler(true);
  std::abort();  // the scheduler never comes back to a failed fiber
}

void* shared_static(size_t bytes, size_t alignment, Site where) {
  if (alignment > 128) fail("shared memory: alignment above 128");
  Shared& shared = statics[{where.file, where.line}];
  if (!shared.memory) shared = allocate(bytes);
  return shared.memory.get();
}

void* shared_dynamic(size_t bytes) {
  if (bytes > dynamic.bytes) {
    fail(text("the kernel's shared struct has ", bytes, " bytes, the launch gave ", dynamic.bytes));
  }
  return dynamic.memory.get();
}

void copy_issue(void* shared, const void* global, int bytes, bool valid, Site where) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes) {
    fail(text("cp.async of ", bytes, " bytes: misaligned pointer at ", where));
  }
  Copy copy{shared, bytes, current->groups, {}};
  if (valid) std::memcpy(copy.data, global, bytes);
  current->copies.push_back(copy);
  std::memset(shared, 0xff, bytes);  // NaN until waited for
}

void copy_commit() { ++current->groups; }

void copy_wait(int pending) { land(*current, current->groups - pending); }

void preempt() {
  if (options().order == Order::kRandom && dice() % 16 == 0) to_scheduler();
}

void collective(unsigned mask, void* value, Combine combine, const char* name, Site where) {
  Fiber& self = *current;
  if (!(mask >> self.lane & 1)) fail(text(name, " at ", where, ": the calling lane is not in its mask"));
  self.mask = mask;
  self.combine = combine;
  self.value = value;
  block_here(name, where);
  void* lanes[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const int number = 32 * self.warp + i;
    if (number >= threads || pool[number].done) {
      fail(text(name, " at ", where, ": lane ", i, " of the mask has exited or never was"));
    }
    Fiber& other = pool[number];
    if (!other.waits_at) return to_scheduler();  // not all here yet; the last one combines
    if (other.combine != combine || other.mask != mask || !same(other.site, where)) {
      fail(text(name, " at ", where, " meets ", other.waits_at, " at ", other.site, " in lane ", i));
    }
    lanes[i] = other.value;
  }
  combine(lanes, mask);
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) wake(pool[32 * self.warp + i]);
  }
}

int barrier(int predicate, int (*fold)(int, int), const char* name, Site where) {
  static int result;  // the next barrier cannot complete before every thread has left this one
  Fiber& self = *current;
  if (alive < threads) fail(text(name, " at ", where, ": a thread of the block has exited and will never arrive"));
  block_here(name, where);
  self.mask = 0;  // so that a collective that meets it reports the mix-up
  self.combine = nullptr;
  if (arrived == 0) first_arrival = where;
  if (!same(first_arrival, where)) fail(text(name, " at ", where, " meets the barrier at ", first_arrival));
  folded = arrived == 0 || !fold ? predicate : fold(folded, predicate);
  if (++arrived < threads) {
    to_scheduler();
    return result;
  }
  result = folded;
  arrived = 0;
  for (int i = 0; i < threads; ++i) wake(pool[i]);
  return result;
}

cudaError_t run(dim3 grid, dim3 block, size_t smem, void (*thread)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  message.clear();
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (count == 0 || count > 1024 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    message = "launch: empty or oversized grid or block";
    return cudaErrorInvalidConfiguration;
  }
  threads = static_cast<int>(count);
  thread_main = thread;
  thread_context = context;
  gridDim = grid;
  blockDim = block;
  dice.seed(options().seed);
  while (pool.size() < count) pool.emplace_back();
  for (uint64_t i = 0; i < blocks && message.empty(); ++i) {
    const uint64_t b = options().order == Order::kForward ? i : blocks - 1 - i;
    blockIdx.x = static_cast<unsigned>(b % grid.x);
    blockIdx.y = static_cast<unsigned>(b / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(b / grid.x / grid.y);
    statics.clear();
    dynamic = allocate(smem);
    ready.assign((threads + 31) / 32, 0);
    for (int t = 0; t < threads; ++t) {
      start(pool[t], t);
      ready[t / 32] |= 1u << t % 32;
    }
    alive = threads;
    arrived = 0;
    run_block();
  }
  return message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace detail
}  // namespace simt
