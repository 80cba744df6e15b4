// The pool of threads in children of fork, on systems that have it.
#include <sys/wait.h>
#include <unistd.h>

#include "tests/regions.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

// Runs the child's part in a child; true if it returned true in time.
template <class Child>
bool in_child(const Child& child) {
  const pid_t id = fork();
  if (id == 0) {
    alarm(20);  // a child that hangs fails
    _exit(child() ? 0 : 1);
  }
  int status = -1;
  waitpid(id, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool computes() {
  for (int i = 0; i < 50; ++i)
    if (!sums_up(100)) return false;
  int together = 0;
  whole_region([&](int worker, int workers, Barrier& barrier) {
    barrier.wait();
    if (worker == 0) together = workers;
    barrier.wait();
  });
  return together == Threads::count();
}

void test_pool() {
  Threads::set_count(3);
  CHECK(computes(), "the parent before");
  CHECK(in_child(computes), "a child, the pool awake");
  CHECK(computes(), "the parent between");
  pause_ms(20);
  CHECK(in_child(computes), "a child, the pool asleep");
  CHECK(in_child([] { return computes() && in_child(computes) && computes(); }), "a grandchild");
  CHECK(in_child([] { Threads::set_count(5); return computes(); }), "a child with more threads");
}

void test_busy_pool() {
  Threads::set_count(3);
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop.load())
      whole_region([](int, int, Barrier& barrier) {
        barrier.wait();
        usleep(200);
      });
  });
  for (int i = 0; i < 20; ++i) CHECK(in_child(computes), "a child, another thread in a region");
  stop.store(true);
  other.join();
  CHECK(computes(), "the parent after");
}

}  // namespace

int main() {
#if defined(__SANITIZE_THREAD__)
  return 0;  // which does not follow threads made after a fork
#else
  test_pool();
  test_busy_pool();
  return finish("fork");
#endif
}
