// The machinery behind cuda_emulation.h: a block's threads, their meetings, shared memory.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

#ifdef FASTDIFF_EMULATE_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <deque>
#include <thread>
#else
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#endif

// Where shared.ld puts the kernels' shared variables. There may be none.
extern "C" {
extern char __attribute__((weak, visibility("hidden"))) fastdiff_shared_begin[];
extern char __attribute__((weak, visibility("hidden"))) fastdiff_shared_end[];
}

namespace fastdiff::cuda::emulation {

#ifdef FASTDIFF_EMULATE_THREADS
thread_local constinit Thread* self = nullptr;
#else
constinit Thread* self = nullptr;
#endif

namespace {

constexpr int kMaxThreads = 1024, kWarp = 32;

// Atomics that carry values between lanes order nothing else, or ThreadSanitizer would take a
// shuffle for a barrier. What little order they need themselves, x86 gives.
#if defined(__x86_64__)
constexpr auto kNoOrder = std::memory_order_relaxed;
#else
constexpr auto kNoOrder = std::memory_order_seq_cst;
#endif
constexpr auto kRelaxed = std::memory_order_relaxed;

struct Place {
  std::atomic<const char*> file{nullptr};
  std::atomic<unsigned> line{0};

  void set(const Where& where) {
    file.store(where.file_name(), kNoOrder);
    line.store(where.line(), kNoOrder);
  }
  bool is(const Place& other) const {
    return line.load(kNoOrder) == other.line.load(kNoOrder) &&
           !std::strcmp(file.load(kNoOrder), other.file.load(kNoOrder));
  }
  std::string text() const {
    const std::string name = file.load(kNoOrder);
    return name.substr(name.rfind('/') + 1) + ":" + std::to_string(line.load(kNoOrder));
  }
};

// Where `expected` threads meet, round after round; the last to come lets the others go on.
struct Meeting {
  std::atomic<uint32_t> arrived{0}, round{0};
  std::vector<int> waiting;  // fibers
};

// What the lanes of a mask give to each other, kept at the lowest of them. Two sets, used in turn:
// a lane can be one round ahead of another, never two.
struct Exchange {
  Meeting meeting;
  std::atomic<unsigned> mask{0};
  std::array<std::atomic<uint64_t>, kWarp> value[2];
  std::array<Place, kWarp> place[2];
};

struct Worker : Thread {
  int index = 0;
  std::atomic<bool> waits{false};
  Place place;  // where it waits
#ifndef FASTDIFF_EMULATE_THREADS
  void* stack = nullptr;
  bool started = false;
  jmp_buf context;
#endif
};

// One block at a time: the state of all its threads.
struct Machine {
  const char* text = "";
  const std::function<void()>* kernel = nullptr;
  int size = 0;
  dim3 grid;
  char* dynamic = nullptr;
  size_t dynamic_bytes = 0;

  std::array<Worker, kMaxThreads> workers;
  std::array<Exchange, kMaxThreads> exchanges;
  Meeting barrier;
  std::array<Place, kMaxThreads> place[2];  // at the barrier
  std::atomic<bool> any[2]{};

  std::atomic<int> finished{0};
  std::atomic<bool> stop{false};
  std::mutex failure_lock;
  std::string failure;

#ifdef FASTDIFF_EMULATE_THREADS
  Meeting between_blocks;
  std::atomic<int> blocked{0};  // threads that wait or have finished
  unsigned __int128 next = 0;
#else
  std::vector<int> ready;
  jmp_buf scheduler;
  ~Machine();
#endif
};

std::unique_ptr<Machine> machine;
std::mutex launch_lock;

// By the accesses' width: 1, 2, 4, 8, 16 bytes.
std::atomic<uint64_t> reads[5], writes[5], launches;

// Every access by itself, where traced.
struct Access {
  uint64_t address;
  uint32_t bytes, written, launch, unused;
};
bool tracing = false;
std::vector<Access> accesses;

Worker& me() { return static_cast<Worker&>(*self); }

[[noreturn]] void fail(const std::string& what) {
  const auto at = [](dim3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) +
           ")";
  };
  throw std::runtime_error(what + " in block " + at(self->block) + ", thread " + at(self->thread));
}

std::string who_waits() {
  std::map<std::string, int> places;
  for (int i = 0; i < machine->size; ++i)
    if (machine->workers[i].waits.load(kNoOrder)) ++places[machine->workers[i].place.text()];
  std::string text;
  for (const auto& [place, count] : places)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " at " + place;
  return "threads wait for others that never come: " + text + "; " +
         std::to_string(machine->finished.load(kNoOrder)) + " of " + std::to_string(machine->size) +
         " have finished;";
}

void record(const std::string& what) {
  const std::lock_guard guard(machine->failure_lock);
  if (machine->failure.empty()) machine->failure = what;
  machine->stop.store(true, kRelaxed);
}

// Not memset: AddressSanitizer guards the gaps between the section's variables.
__attribute__((no_sanitize("address"))) void fill_with_nan(char* begin, const char* end) {
  volatile char* at = begin;
  for (; end - at >= 8; at += 8) *reinterpret_cast<volatile uint64_t*>(at) = ~uint64_t{0};
  for (; at < end; ++at) *at = -1;
}

void fill_shared() {
  fill_with_nan(fastdiff_shared_begin, fastdiff_shared_end);
  fill_with_nan(machine->dynamic, machine->dynamic + machine->dynamic_bytes);
}

void place_block(uint64_t index) {
  const dim3 grid = machine->grid;
  const dim3 block(static_cast<unsigned>(index % grid.x),
                   static_cast<unsigned>(index / grid.x % grid.y),
                   static_cast<unsigned>(index / grid.x / grid.y));
  for (int i = 0; i < machine->size; ++i) machine->workers[i].block = block;
  machine->finished.store(0, kNoOrder);
  fill_shared();
}

uint64_t blocks() { return uint64_t{machine->grid.x} * machine->grid.y * machine->grid.z; }

#ifdef FASTDIFF_EMULATE_THREADS

struct Stopped {};  // another thread failed

// The system's call itself, which no sanitizer takes for a synchronisation.
void futex(std::atomic<uint32_t>& word, int what, uint32_t value, const timespec* limit = nullptr) {
  syscall(SYS_futex, &word, what, value, limit, nullptr, 0);
}

// Asleep until the meeting is past `round`, or another thread failed.
void sleep_in(Meeting& meeting, uint32_t round, std::memory_order order) {
  const timespec limit{0, 20'000'000};
  while (meeting.round.load(order) == round) {
    if (machine->stop.load(kRelaxed)) throw Stopped{};
    futex(meeting.round, FUTEX_WAIT_PRIVATE, round, &limit);
  }
}

void wait(Meeting& meeting, uint32_t round, std::memory_order order) {
  if (machine->blocked.fetch_add(1, kNoOrder) + 1 == machine->size) fail(who_waits());
  sleep_in(meeting, round, order);
}

void wake(Meeting& meeting) { futex(meeting.round, FUTEX_WAKE_PRIVATE, kMaxThreads); }

void released(int others) { machine->blocked.fetch_sub(others, kNoOrder); }

#else

constexpr size_t kStack = 128 * 1024;
constexpr uint64_t kCanary = 0x5afe57ac5afe57ac;  // at the stack's end

void to_scheduler() {
  if (!_setjmp(me().context)) _longjmp(machine->scheduler, 1);
}

void wait(Meeting& meeting, uint32_t, std::memory_order) {
  meeting.waiting.push_back(me().index);
  to_scheduler();
}

void wake(Meeting& meeting) {
  machine->ready.insert(machine->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
}

void released(int) {}

Machine::~Machine() {
  for (auto& worker : workers)
    if (worker.stack) munmap(worker.stack, kStack);
}

#endif

// Comes to the meeting as one of `expected`; the last of them calls `last` before all go on. With
// `order`, what was written before it is seen by all after it.
template <class Last>
void meet(Meeting& meeting, int expected, bool order, const Where& where, Last last) {
  const uint32_t round = meeting.round.load(kNoOrder);
  const auto arrive = order ? std::memory_order_acq_rel : kNoOrder;
  if (meeting.arrived.fetch_add(1, arrive) + 1 == static_cast<uint32_t>(expected)) {
    last();
    meeting.arrived.store(0, kNoOrder);
    released(expected - 1);
    meeting.round.store(round + 1, order ? std::memory_order_release : kNoOrder);
    wake(meeting);
  } else {
    me().place.set(where);
    me().waits.store(true, kNoOrder);
    wait(meeting, round, order ? std::memory_order_acquire : kNoOrder);
    me().waits.store(false, kNoOrder);
  }
}

// The meeting of `mask`'s lanes, in which `value` is given; where the values then are.
std::pair<Exchange*, int> meet_at(unsigned mask, bool order, uint64_t value, const Where& where) {
  const int here = me().index % kWarp, warp = me().index - here;
  const int lanes = std::min(kWarp, machine->size - warp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;  // there are no others
  if (!(mask >> here & 1)) fail("a lane's own bit is missing in its mask");
  const int lowest = std::countr_zero(mask);
  Exchange& exchange = machine->exchanges[warp + lowest];
  unsigned found = 0;
  if (!exchange.mask.compare_exchange_strong(found, mask, kNoOrder) && found != mask)
    fail("lanes that meet name different masks");
  const int turn = exchange.meeting.round.load(kNoOrder) % 2;
  exchange.value[turn][here].store(value, kNoOrder);
  exchange.place[turn][here].set(where);
  meet(exchange.meeting, std::popcount(mask), order, where,
       [&] { exchange.mask.store(0, kNoOrder); });
  const auto& place = exchange.place[turn];
  if (!place[here].is(place[lowest]))
    fail("lanes of a warp meet in different places, " + place[lowest].text() + " and " +
         place[here].text() + ",");
  return {&exchange, turn};
}

// The kernel in this worker, for the block that is set.
void run_kernel() {
  try {
    (*machine->kernel)();
    machine->finished.fetch_add(1, kNoOrder);
#ifdef FASTDIFF_EMULATE_THREADS
    // `finished` is read last: between the two counts other threads may have finished as well.
    if (machine->blocked.fetch_add(1, kNoOrder) + 1 == machine->size &&
        machine->finished.load(kNoOrder) < machine->size)
      fail(who_waits());
  } catch (const Stopped&) {
#endif
  } catch (const std::exception& error) {
    record(error.what());
  }
}

#ifdef FASTDIFF_EMULATE_THREADS

// All blocks, in one of the block's threads.
void run_blocks(Worker* worker) {
  self = worker;
  Meeting& meeting = machine->between_blocks;
  for (uint64_t index = 0; index < blocks(); ++index) {
    const uint32_t round = meeting.round.load(kNoOrder);
    if (meeting.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 ==
        static_cast<uint32_t>(machine->size)) {
      place_block(index);
      machine->blocked.store(0, kNoOrder);
      meeting.arrived.store(0, kNoOrder);
      meeting.round.store(round + 1, std::memory_order_release);
      wake(meeting);
    } else {
      try {
        sleep_in(meeting, round, std::memory_order_acquire);
      } catch (const Stopped&) {
      }
    }
    if (machine->stop.load(kRelaxed)) return;
    run_kernel();
    if (machine->stop.load(kRelaxed)) return;
  }
}

// Threads that stay for the next launch: to make one takes longer than a small kernel.
class Pool {
 public:
  ~Pool() {
    machine.reset();
    run(static_cast<int>(threads_.size()));
    for (auto& thread : threads_) thread.join();
  }

  // run_blocks in `size` threads; without a machine, their end.
  void run(int size) {
    left_.store(size, kRelaxed);
    for (int i = 0; i < size; ++i) {
      if (i == static_cast<int>(threads_.size())) {
        turns_.emplace_back(0);
        threads_.emplace_back([this, i, &turn = turns_.back()] { work(i, turn); });
      }
      turns_[i].fetch_add(1, std::memory_order_release);
      futex(turns_[i], FUTEX_WAKE_PRIVATE, 1);
    }
    while (const uint32_t left = left_.load(std::memory_order_acquire))
      futex(left_, FUTEX_WAIT_PRIVATE, left);
  }

 private:
  void work(int index, std::atomic<uint32_t>& turn) {
    for (uint32_t seen = 0;; ++seen) {
      while (turn.load(std::memory_order_acquire) == seen) futex(turn, FUTEX_WAIT_PRIVATE, seen);
      const bool last = !machine;
      if (!last) run_blocks(&machine->workers[index]);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) futex(left_, FUTEX_WAKE_PRIVATE, 1);
      if (last) return;
    }
  }

  std::atomic<uint32_t> left_{0};
  std::deque<std::atomic<uint32_t>> turns_;  // how often each thread was asked to run
  std::vector<std::thread> threads_;
};

void run_grid() {
  static Pool pool;
  pool.run(machine->size);
}

#else

void fiber_main() {
  for (;;) {
    run_kernel();
    to_scheduler();
  }
}

void resume(Worker& worker) {
  self = &worker;
  if (_setjmp(machine->scheduler)) return;  // back from it
  if (worker.started) _longjmp(worker.context, 1);
  worker.started = true;
  if (!worker.stack) {
    worker.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (worker.stack == MAP_FAILED) throw std::bad_alloc();
    *static_cast<uint64_t*>(worker.stack) = kCanary;
  }
  ucontext_t context, unused;
  getcontext(&context);
  context.uc_stack.ss_sp = worker.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  swapcontext(&unused, &context);
}

void run_grid() {
  for (uint64_t index = 0; index < blocks(); ++index) {
    place_block(index);
    auto& ready = machine->ready;
    ready.clear();
    for (int i = 0; i < machine->size; ++i) ready.push_back(i);
    for (size_t next = 0; next < ready.size() && !machine->stop.load(kRelaxed); ++next) {
      resume(machine->workers[ready[next]]);
      if (next > 8192) ready.erase(ready.begin(), ready.begin() + std::exchange(next, 0));
    }
    for (int i = 0; i < machine->size; ++i)
      if (const auto* end = static_cast<uint64_t*>(machine->workers[i].stack);
          end && *end != kCanary)
        record("a thread's stack overflowed");
    if (!machine->stop.load(kRelaxed) && machine->finished.load(kRelaxed) < machine->size)
      record(who_waits() + " in block " + std::to_string(index));
    if (machine->stop.load(kRelaxed)) return;
  }
}

#endif

void count(std::atomic<uint64_t>* counters, const void* at, size_t bytes, const char* access) {
  if (!at || reinterpret_cast<uintptr_t>(at) % bytes)
    fail(std::string(access) + " of " + std::to_string(bytes) +
         " bytes at an address of remainder " +
         std::to_string(reinterpret_cast<uintptr_t>(at) % bytes) + (at ? "" : " (null)"));
  auto& counter = counters[std::countr_zero(bytes)];
#ifdef FASTDIFF_EMULATE_THREADS
  counter.fetch_add(1, kRelaxed);
#else
  counter.store(counter.load(kRelaxed) + 1, kRelaxed);
  if (tracing)
    accesses.push_back({reinterpret_cast<uintptr_t>(at), static_cast<uint32_t>(bytes),
                        counters == writes, static_cast<uint32_t>(launches.load(kRelaxed)), 0});
#endif
}

}  // namespace

void launch(const char* text, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& kernel) {
  const std::lock_guard guard(launch_lock);
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error("launch of " + std::string(text) + ": " + what);
  };
  if (size < 1 || size > kMaxThreads)
    refuse("a block of " + std::to_string(size) + " threads, wanted 1 to 1024");
  if (!machine) machine = std::make_unique<Machine>();
  machine->text = text;
  machine->kernel = &kernel;
  machine->size = static_cast<int>(size);
  machine->grid = grid;
  std::unique_ptr<char[]> dynamic(new char[shared_bytes]);  // its own, for AddressSanitizer
  machine->dynamic = dynamic.get();
  machine->dynamic_bytes = shared_bytes;
  for (unsigned i = 0; i < size; ++i) {
    Worker& worker = machine->workers[i];
    worker.index = static_cast<int>(i);
    worker.thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    worker.block_size = block;
    worker.grid_size = grid;
  }
  ++launches;
  run_grid();
  self = nullptr;
  if (const std::string failure = machine->failure; !failure.empty()) {
    machine.reset();  // threads that were left in the middle go with it
    refuse(failure);
  }
}

void* dynamic_shared() {
  if (!machine->dynamic_bytes) fail("the launch gives no dynamic shared memory");
  return machine->dynamic;
}

void count_load(const void* at, size_t bytes) { count(reads, at, bytes, "load"); }
void count_store(const void* at, size_t bytes) { count(writes, at, bytes, "store"); }

int lane() { return me().index % kWarp; }

bool barrier(bool value, const Where& where) {
  Meeting& meeting = machine->barrier;
  const int turn = meeting.round.load(kNoOrder) % 2;
  auto& place = machine->place[turn];
  place[me().index].set(where);
  if (value) machine->any[turn].store(true, kNoOrder);
  meet(meeting, machine->size, true, where, [&] { machine->any[1 - turn].store(false, kNoOrder); });
  if (!place[me().index].is(place[0]))
    fail("threads of a block are at different barriers, " + place[0].text() + " and " +
         place[me().index].text() + ",");
  return machine->any[turn].load(kNoOrder);
}

void meet_lanes(unsigned mask, bool order, const Where& where) { meet_at(mask, order, 0, where); }

uint64_t exchange(unsigned mask, uint64_t value, int from, const Where& where) {
  if (!(mask >> from & 1))
    fail("a shuffle reads lane " + std::to_string(from) + ", not in its mask");
  const auto [at, turn] = meet_at(mask, false, value, where);
  if (me().index - lane() + from >= machine->size)
    fail("a shuffle reads lane " + std::to_string(from) + ", which the block does not have");
  return at->value[turn][from].load(kNoOrder);
}

unsigned ballot(unsigned mask, bool value, const Where& where) {
  const auto [at, turn] = meet_at(mask, false, value, where);
  unsigned votes = 0;
  for (int i = 0; i < kWarp && me().index - lane() + i < machine->size; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(at->value[turn][i].load(kNoOrder)) << i;
  return votes;
}

}  // namespace fastdiff::cuda::emulation

#pragma GCC visibility push(default)
extern "C" {

// Loads of 1, 2, 4, 8 and 16 bytes, stores likewise, and launches, since the last reset.
void fastdiff_emulation_traffic(uint64_t* counts) {
  namespace emulation = fastdiff::cuda::emulation;
  for (int i = 0; i < 5; ++i) {
    counts[i] = emulation::reads[i];
    counts[5 + i] = emulation::writes[i];
  }
  counts[10] = emulation::launches;
}

void fastdiff_emulation_reset(bool trace) {
  namespace emulation = fastdiff::cuda::emulation;
  for (int i = 0; i < 5; ++i) emulation::reads[i] = emulation::writes[i] = 0;
  emulation::launches = 0;
  emulation::tracing = trace;
  emulation::accesses.clear();
}

// The accesses since the last reset, if that asked for a trace, and how many.
const void* fastdiff_emulation_accesses(uint64_t* count) {
  namespace emulation = fastdiff::cuda::emulation;
  *count = emulation::accesses.size();
  return emulation::accesses.data();
}
}
#pragma GCC visibility pop
