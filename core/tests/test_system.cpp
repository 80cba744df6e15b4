// What the core asks of the operating system.
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "base/system.h"
#include "tests/check.h"

#if defined(__linux__)
#include "base/linux_processors.h"
#endif

using namespace anymamba;
using namespace anymamba::test;

namespace {

std::atomic<int> forgotten{0};

void test_thread_exit() {
  static const AtThreadExit at_exit([](void* value) { forgotten += *static_cast<int*>(value); });
  int one = 1, ten = 10;
  std::thread first([&] { at_exit.set(&one); });
  first.join();
  CHECK(forgotten == 1, "%d", forgotten.load());
  std::thread second([&] { at_exit.set(&one), at_exit.set(&ten); });
  std::thread none([] {});
  second.join(), none.join();
  CHECK(forgotten == 11, "%d: a thread's last value alone is its own", forgotten.load());
}

void test_thread_time() {
  using Clock = std::chrono::steady_clock;
  const std::int64_t start = thread_time();
  if (start < 0) return;  // the system does not tell
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  const std::int64_t slept = thread_time() - start;
  CHECK(slept >= 0 && slept < 20'000'000, "%lld ns of computing while asleep", (long long)slept);
  // However busy the machine is, in ten seconds a thread computes for a millisecond.
  const auto begin = Clock::now();
  while (thread_time() - start < slept + 1'000'000 && Clock::now() - begin < std::chrono::seconds(10)) {}
  const std::chrono::duration<double, std::nano> passed = Clock::now() - begin;
  const auto computed = static_cast<double>(thread_time() - start - slept);
  CHECK(computed >= 1e6 && computed < 1.5 * passed.count(), "%g of %g ns", computed, passed.count());
}

void test_processors() {
  const int allowed = allowed_processors(), fast = performance_processors();
  CHECK(1 <= fast && fast <= allowed, "%d of %d", fast, allowed);
  CHECK(Threads::count() == fast, "%d threads by default", Threads::count());
}

void test_mapped_memory() {
  constexpr std::size_t kBytes = (5 << 20) + 1;
  auto* const memory = static_cast<unsigned char*>(map_memory(kBytes));
  CHECK(memory != nullptr, "no memory");
  if (memory == nullptr) return;
  CHECK(reinterpret_cast<std::uintptr_t>(memory) % 4096 == 0, "%p is no page", (void*)memory);
  bool zeros = true;
  for (std::size_t i = 0; i < kBytes; i += 4096) zeros = zeros && memory[i] == 0;
  CHECK(zeros && memory[kBytes - 1] == 0, "it is not zeros");
  std::memset(memory, 1, kBytes);
  unmap_memory(memory, kBytes);
  CHECK(map_memory(std::size_t{1} << 62) == nullptr, "more memory than there are addresses");
}

#if defined(__linux__) && defined(__aarch64__)
// As the processor itself says it, in registers that Linux lets programs read.
void test_arm_features() {
  std::uint64_t pfr0, isar0, isar1;
  asm("mrs %0, ID_AA64PFR0_EL1" : "=r"(pfr0));
  asm("mrs %0, ID_AA64ISAR0_EL1" : "=r"(isar0));
  asm("mrs %0, ID_AA64ISAR1_EL1" : "=r"(isar1));
  const auto field = [](std::uint64_t value, int shift) { return static_cast<int>(value >> shift & 15); };
  const ArmFeatures found = arm_features();
  CHECK(found.fp16 == (field(pfr0, 20) == 1), "fp16 is %d", found.fp16);
  CHECK(found.dotprod == (field(isar0, 44) != 0), "dotprod is %d", found.dotprod);
  CHECK(found.i8mm == (field(isar1, 52) != 0), "i8mm is %d", found.i8mm);
  CHECK(found.bf16 == (field(isar1, 44) != 0), "bf16 is %d", found.bf16);
}
#elif !defined(__aarch64__)
void test_arm_features() {
  const ArmFeatures found = arm_features();
  CHECK(!(found.fp16 || found.dotprod || found.i8mm || found.bf16), "this is no Arm");
}
#else
void test_arm_features() { arm_features(); }  // there is nothing else to ask
#endif

#if defined(__linux__)

using Cpus = std::vector<int>;

void test_processor_lists() {
  CHECK((processor_list("0-3,8,10-11") == Cpus{0, 1, 2, 3, 8, 10, 11}), "ranges and numbers");
  CHECK((processor_list("5") == Cpus{5}), "one");
  for (const char* const none : {"", "x", "3-", "-1", "3-1", "1,,2", "1;2", "0-99999999999", " "})
    CHECK(processor_list(none).empty(), "'%s' is a list of %zu", none, processor_list(none).size());
}

// A folder like /sys/devices, for as long as it lives.
class Devices {
 public:
  Devices() { std::filesystem::remove_all(root_); }
  ~Devices() { std::filesystem::remove_all(root_); }
  std::string root() const { return root_.string(); }
  void write(const std::string& name, const std::string& text) {
    const std::filesystem::path path = root_ / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text << '\n';
  }
  void capacities(const std::vector<int>& numbers) {
    for (std::size_t cpu = 0; cpu < numbers.size(); ++cpu)
      write("system/cpu/cpu" + std::to_string(cpu) + "/cpu_capacity", std::to_string(numbers[cpu]));
  }

 private:
  const std::filesystem::path root_ =
      std::filesystem::temp_directory_path() / ("anymamba_devices_" + std::to_string(std::random_device{}()));
};

void test_fast_processors() {
  const Cpus all = {0, 1, 2, 3, 4, 5, 6, 7};
  {
    Devices none;
    CHECK(fast_processors(none.root(), all) == all, "nothing is said");
    CHECK(fast_processors(none.root(), {}).empty(), "nothing is allowed");
  }
  {
    Devices hybrid;  // Intel's: two performance cores with two threads each, four efficiency cores
    hybrid.write("cpu_core/cpus", "0-3");
    hybrid.write("cpu_atom/cpus", "4-7");
    CHECK((fast_processors(hybrid.root(), all) == Cpus{0, 1, 2, 3}), "the performance cores");
    CHECK((fast_processors(hybrid.root(), {1, 3, 6}) == Cpus{1, 3}), "those of them that are allowed");
    CHECK((fast_processors(hybrid.root(), {5, 6}) == Cpus{5, 6}), "none of them is allowed");
  }
  {
    Devices phone;  // four small processors, two of middle size and two large ones
    phone.capacities({250, 250, 250, 250, 620, 620, 1024, 1024});
    CHECK((fast_processors(phone.root(), all) == Cpus{4, 5, 6, 7}), "without the small ones");
    CHECK((fast_processors(phone.root(), {0, 1, 7}) == Cpus{7}), "the large one that is allowed");
    CHECK((fast_processors(phone.root(), {0, 1}) == Cpus{0, 1}), "the small ones alone");
  }
  {
    Devices board;
    board.capacities({530, 530, 530, 530, 1024, 1024, 1024, 1024});
    CHECK((fast_processors(board.root(), all) == Cpus{4, 5, 6, 7}), "half as fast is small");
  }
  {
    Devices equal;
    equal.capacities({1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024});
    CHECK(fast_processors(equal.root(), all) == all, "all alike");
  }
  {
    Devices broken;
    broken.write("cpu_core/cpus", "no list");
    broken.write("system/cpu/cpu0/cpu_capacity", "no number");
    CHECK(fast_processors(broken.root(), all) == all, "nothing that can be read is said");
  }
}

#endif

}  // namespace

int main() {
  test_processors();  // first: others change the number of threads
  test_thread_exit();
  test_thread_time();
  test_mapped_memory();
  test_arm_features();
#if defined(__linux__)
  test_processor_lists();
  test_fast_processors();
#endif
  return finish("system");
}
