// Runs a kernel on the CPU: one fiber per CUDA thread, block after block, on one OS thread. A fiber runs until it must
// wait for others, so a kernel that forgets a barrier reads what has not been written yet in one of the orders.
#include "simt.h"

#include <dlfcn.h>
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

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN(...) __VA_ARGS__
#else
#define SIMT_ASAN(...)
#endif

// ThreadSanitizer takes every fiber for a thread and learns here what orders their accesses. This file is built without
// -fsanitize=thread, but with SIMT_TSAN: how it moves data is nothing that the kernel does.
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#define SIMT_TSAN_ONLY(...) __VA_ARGS__
extern "C" void __tsan_read_range(const void*, size_t), __tsan_write_range(void*, size_t);
extern "C" void AnnotateIgnoreReadsBegin(const char*, int), AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int), AnnotateIgnoreWritesEnd(const char*, int);
struct Unseen {  // malloc, memcpy and the lambdas of host.h report to the sanitizer wherever they are called
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
};
#define SIMT_UNSEEN const Unseen unseen;
#else
#define SIMT_TSAN_ONLY(...)
#define SIMT_UNSEEN
#endif

namespace simt {
namespace {

// A context is a saved stack pointer; the callee-saved registers lie on the stack it points to.
using Context = void*;
extern "C" void simt_switch(Context* save, Context load);
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

constexpr size_t kStack = SIMT_ASAN(4 *) 64 * 1024;

struct Copy { void* target; int bytes, group; char data[16]; };  // a cp.async on its way

struct Fiber {
  Context context;
  char* stack = nullptr;
  uint3 index;
  int warp, lane, groups;  // groups: committed of cp.async
  std::deque<Copy> copies;
  bool done, fenced;  // fenced: has passed a __threadfence
  const char* waits_at;  // name of the collective or barrier, null while it can run
  Site site;
  unsigned mask;  // of the collective; 0: a barrier
  detail::Combine combine;
  void* value;
  SIMT_ASAN(void* fake_stack = nullptr;)
  SIMT_TSAN_ONLY(void* tsan = nullptr;)
};

struct Shared { std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free}; size_t bytes = 0; };

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
SIMT_TSAN_ONLY(void* scheduler_tsan; std::vector<void*> live; char finished;)

std::ostream& operator<<(std::ostream& out, Site site) { return out << site.file << ":" << site.line; }
std::ostream& operator<<(std::ostream& out, uint3 v) { return out << "(" << v.x << "," << v.y << "," << v.z << ")"; }

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

bool same(Site a, Site b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

void to_scheduler([[maybe_unused]] bool for_ever = false) {
  Fiber* self = current;
  SIMT_ASAN(void** kept = for_ever ? nullptr : &self->fake_stack;
            __sanitizer_start_switch_fiber(kept, scheduler_stack, scheduler_stack_bytes);)
  SIMT_TSAN_ONLY(__tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);)
  simt_switch(&self->context, scheduler);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);)
}

void entry() {
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);)
  thread_main(thread_context);
  if (!current->copies.empty()) detail::fail("a thread ends with a cp.async under way: its target may be another block's by then");
  SIMT_TSAN_ONLY(__tsan_release(&finished);)
  current->done = true;
  --alive;
  ready[current->warp] &= ~(1u << current->lane);
  to_scheduler(true);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  SIMT_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);)
  SIMT_TSAN_ONLY(__tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);)
  simt_switch(&scheduler, fiber.context);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
  current = nullptr;
}

void block_here(const char* name, Site where) {
  current->waits_at = name;
  current->site = where;
  ready[current->warp] &= ~(1u << current->lane);
}

#if defined(SIMT_TSAN)
// Everything that these lanes of these warps did before is seen by each of them after. The last to arrive acquires for
// all: one that did it itself would acquire what others had done since. The key is a stack's, so that blocks share none.
void order(int first, int last, unsigned mask) {
  Fiber* lead = nullptr;
  for (const bool acquire : {false, true}) {
    for (int i = first; i < last; ++i) {
      if (!(mask >> i % 32 & 1)) continue;
      if (!lead) lead = &pool[i];
      __tsan_switch_to_fiber(pool[i].tsan, __tsan_switch_to_fiber_no_sync);
      acquire ? __tsan_acquire(lead->stack) : __tsan_release(lead->stack);
    }
  }
  __tsan_switch_to_fiber(current->tsan, __tsan_switch_to_fiber_no_sync);
}

void forget() {
  for (; !live.empty(); live.pop_back()) __tsan_destroy_fiber(live.back());
}

void close() {  // a stream orders launches, threads that a failure left behind included; nothing orders the blocks of one
  for (int i = 0; i < threads; ++i) {
    if (!pool[i].done) __tsan_switch_to_fiber(pool[i].tsan, __tsan_switch_to_fiber_no_sync), __tsan_release(&finished);
  }
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
  __tsan_acquire(&finished);
  message.empty() ? forget() : live.clear();  // to destroy a thread that is still unseen would be reported
}
#endif

void wake(Fiber& fiber) {
  fiber.waits_at = nullptr;
  ready[fiber.warp] |= 1u << fiber.lane;
}

void start(Fiber& fiber, int number) {
  const size_t page = sysconf(_SC_PAGESIZE);
  // A new stack is new memory to ThreadSanitizer; on the old one the last block's accesses would race with this one's.
  SIMT_TSAN_ONLY(if (fiber.stack) munmap(fiber.stack - page, kStack + page); fiber.stack = nullptr;)
  SIMT_TSAN_ONLY(live.push_back(fiber.tsan = __tsan_create_fiber(0));)
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // running over the end faults instead of eating a neighbour's stack
    fiber.stack = static_cast<char*>(memory) + page;
  }
  SIMT_ASAN(__asan_unpoison_memory_region(fiber.stack, kStack);)  // frames of an aborted launch never returned
  const unsigned n = number;
  fiber.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
  fiber.warp = number / 32, fiber.lane = number % 32;
  fiber.done = fiber.fenced = false;
  fiber.waits_at = nullptr;
  fiber.groups = 0;
  fiber.copies.clear();
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 2;  // 8 mod 16 at entry, as after a call
  *top = reinterpret_cast<void*>(entry);
  fiber.context = top - 6;
}

Shared allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes)) throw std::bad_alloc();
  return {{std::memset(memory, 0xff, bytes), std::free}, bytes};  // NaN and -1: a read of what was never written shows
}

int pick(unsigned lanes) {
  if (options.order == kReverse) return 31 - __builtin_clz(lanes);
  for (int skip = options.order == kRandom ? dice() % __builtin_popcount(lanes) : 0; skip > 0; --skip) lanes &= lanes - 1;
  return __builtin_ctz(lanes);
}

// One warp runs until all its lanes wait. Fair turns would keep the warps in step and hide missing barriers; only the
// random order hands over early now and then.
void run_block() {
  const int warps = static_cast<int>(ready.size());
  int idle = 0;
  for (int turn = 0; alive > 0 && message.empty(); ++turn) {
    int warp = turn % warps;
    if (options.order == kReverse) warp = warps - 1 - warp;
    if (options.order == kRandom && idle == 0) warp = dice() % warps;
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
      if (options.order == kRandom && dice() % 64 == 0) break;
    }
  }
}

void land(Fiber& fiber, int oldest_left) {
  while (!fiber.copies.empty() && fiber.copies.front().group < oldest_left) {
    const Copy& copy = fiber.copies.front();
    SIMT_TSAN_ONLY(__tsan_write_range(copy.target, copy.bytes);)
    SIMT_UNSEEN
    std::memcpy(copy.target, copy.data, copy.bytes);
    fiber.copies.pop_front();
  }
}

}  // namespace

Options options;

namespace detail {

void fail(const std::string& what) {
  message = text(what, " [block ", blockIdx, " thread ", current->index, "]");
  to_scheduler(true);
  std::abort();  // the scheduler never comes back to a failed fiber
}

void* shared_static(size_t bytes, size_t alignment, Site where) {
  SIMT_UNSEEN
  if (alignment > 128) fail("shared memory: alignment above 128");
  if (bytes > 48 * 1024) fail("static shared memory: more than 48 KiB");
  Shared& shared = statics[{where.file, where.line}];
  if (!shared.memory) shared = allocate(bytes);
  if (shared.bytes != bytes) fail(text("static shared memory of two types at ", where));
  return shared.memory.get();
}

void* shared_dynamic(size_t bytes) {
  if (bytes > dynamic.bytes) fail(text("the kernel's shared struct has ", bytes, " bytes, the launch gave ", dynamic.bytes));
  return dynamic.memory.get();
}

void copy_issue(void* shared, const void* global, int bytes, bool valid, Site where) {
  const auto misaligned = [&](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; };
  if (misaligned(shared) || misaligned(global)) fail(text("cp.async of ", bytes, " bytes: misaligned pointer at ", where));
  SIMT_TSAN_ONLY(if (valid) __tsan_read_range(global, bytes); __tsan_write_range(shared, bytes);)
  SIMT_UNSEEN
  Copy copy{shared, bytes, current->groups, {}};
  if (valid) std::memcpy(copy.data, global, bytes);
  current->copies.push_back(copy);
  std::memset(shared, 0xff, bytes);  // NaN until waited for
}

void copy_commit() { ++current->groups; }

void copy_wait(int pending) { land(*current, current->groups - pending); }

void preempt() { if (options.order == kRandom && dice() % 16 == 0) to_scheduler(); }
void fence() { current->fenced = true; }
int atomic_order() { return current->fenced ? __ATOMIC_ACQ_REL : __ATOMIC_RELAXED; }

void collective(unsigned mask, void* value, Combine combine, const char* name, Site where) {
  SIMT_UNSEEN
  Fiber& self = *current;
  if (!(mask >> self.lane & 1)) fail(text(name, " at ", where, ": the calling lane is not in its mask"));
  self.mask = mask, self.combine = combine, self.value = value;
  block_here(name, where);
  void* lanes[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& other = pool[32 * self.warp + i];  // as large as whole warps
    if (other.done) fail(text(name, " at ", where, ": lane ", i, " of the mask has exited or never was"));
    const bool here = other.combine == combine && other.mask == mask && same(other.site, where);
    const bool elsewhere = other.waits_at && !here && (!other.mask || other.mask >> self.lane & 1);  // and waits for us
    if (!other.waits_at || (!here && !elsewhere)) return to_scheduler();  // not all here yet; the last one combines
    if (elsewhere) fail(text(name, " at ", where, " meets ", other.waits_at, " at ", other.site, " in lane ", i));
    lanes[i] = other.value;
  }
  if (combine) combine(lanes, mask);
  SIMT_TSAN_ONLY(else order(32 * self.warp, 32 * self.warp + 32, mask);)
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) wake(pool[32 * self.warp + i]);
  }
}

int barrier(int predicate, int (*fold)(int, int), const char* name, Site where) {
  SIMT_UNSEEN
  static int result;  // the next barrier cannot complete before every thread has left this one
  Fiber& self = *current;
  if (alive < threads) fail(text(name, " at ", where, ": a thread of the block has exited and will never arrive"));
  block_here(name, where);
  self.mask = 0;  // so that a collective that meets it reports the mix-up
  self.combine = nullptr;
  if (arrived == 0) first_arrival = where;
  if (!same(first_arrival, where)) fail(text(name, " at ", where, " meets the barrier at ", first_arrival));
  folded = arrived == 0 || !fold ? predicate : fold(folded, predicate);
  if (++arrived < threads) return to_scheduler(), result;
  result = folded;
  arrived = 0;
  for (int i = 0; i < threads; ++i) wake(pool[i]);
  SIMT_TSAN_ONLY(order(0, threads, 0xffffffffu);)
  return result;
}

cudaError_t run(const void* kernel, void* const* params, dim3 grid, dim3 block, size_t smem, void (*thread)(void*),
                void* context) {
  if (current) fail("launch: inside a kernel");
  const std::lock_guard<std::mutex> lock(one_launch);
  message.clear();
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (count == 0 || count > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || smem > 227 * 1024) {
    message = "launch: empty or oversized grid, block or shared memory";
    return cudaErrorInvalidConfiguration;
  }
  if (options.executor) {
    Dl_info info{};
    dladdr(kernel, &info);
    const unsigned shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
    if (options.executor(info.dli_sname, shape, smem, params)) message = "the executor of this launch has failed";
    return message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
  }
  SIMT_UNSEEN
  SIMT_TSAN_ONLY(scheduler_tsan = __tsan_get_current_fiber();)
  threads = static_cast<int>(count), thread_main = thread, thread_context = context;
  gridDim = grid, blockDim = block;
  dice.seed(options.seed);
  while (pool.size() < (count + 31) / 32 * 32) pool.emplace_back();
  for (size_t i = count; i < pool.size(); ++i) pool[i].done = true;
  for (uint64_t i = 0; i < blocks && message.empty(); ++i) {
    const uint64_t b = options.order == kForward ? i : blocks - 1 - i;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    statics.clear();
    dynamic = allocate(smem);
    SIMT_TSAN_ONLY(if (live.size() > 2000) forget();)  // it has room for 8128 threads, and is slow long before
    ready.assign((threads + 31) / 32, 0);
    for (int t = 0; t < threads; ++t) {
      start(pool[t], t);
      ready[t / 32] |= 1u << t % 32;
    }
    alive = threads, arrived = 0;
    run_block();
  }
  SIMT_TSAN_ONLY(close();)
  return message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace detail
}  // namespace simt

extern "C" void simt_options(simt::Order order, uint64_t seed, decltype(simt::Options::executor) executor) {
  simt::options = {order, seed, executor};
}
extern "C" const char* simt_error() { return simt::message.c_str(); }  // of the last launch, empty after a good one
