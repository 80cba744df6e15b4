// Computing without Python's lock.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <thread>

namespace anymamba::bindings {

// Gives Python's lock to others while it lives.
//
// When a program ends, Python ends daemon threads where they ask for the lock, before 3.14 by
// unwinding their stack, which frames that do not throw must not see: it would abort the program.
// Such a thread waits for the end of the process instead, as it does from 3.14 on.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { take(); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // Whether a signal has come whose handler raises an exception, as Ctrl-C does: then Python's
  // error is set. Looked for some times a second at most, since the lock may be another's.
  bool interrupted() {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ < std::chrono::milliseconds(200)) return false;
    take();
    const bool raised = PyErr_CheckSignals() != 0;
    state_ = PyEval_SaveThread();
    asked_ = std::chrono::steady_clock::now();
    return raised;
  }

 private:
  void take() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // it throws nothing else
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

  PyThreadState* state_;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

}  // namespace anymamba::bindings
