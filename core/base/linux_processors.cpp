#include "base/linux_processors.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>

namespace anymamba {
namespace {

constexpr long kMostProcessors = 1 << 20;  // more is no list of processors

// A file's first line; empty where there is no such file.
std::string line_of(const std::string& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

// Of Intel's hybrids: the performance cores that are allowed.
std::vector<int> performance_cores(const std::string& devices, const std::vector<int>& allowed) {
  std::vector<int> fast;
  const std::vector<int> cores = processor_list(line_of(devices + "/cpu_core/cpus"));
  for (const int cpu : allowed)
    if (std::find(cores.begin(), cores.end(), cpu) != cores.end()) fast.push_back(cpu);
  return fast;
}

// Of Arm's: those with most of the largest capacity. A phone has one processor of 1024, some of 620
// to 900 which are worth having, and small ones of 160 to 530.
std::vector<int> capable_processors(const std::string& devices, const std::vector<int>& allowed) {
  std::vector<long> capacities;
  for (const int cpu : allowed) {
    const std::string file = devices + "/system/cpu/cpu" + std::to_string(cpu) + "/cpu_capacity";
    capacities.push_back(std::strtol(line_of(file).c_str(), nullptr, 10));
  }
  std::vector<int> fast;
  for (std::size_t i = 0; i < allowed.size(); ++i) {
    const long largest = *std::max_element(capacities.begin(), capacities.end());
    if (capacities[i] > 0 && 5 * capacities[i] >= 3 * largest) fast.push_back(allowed[i]);
  }
  return fast;
}

}  // namespace

std::vector<int> processor_list(const std::string& text) {
  std::vector<int> found;
  const char* p = text.c_str();
  while (*p != '\0') {
    char* end = nullptr;
    const long first = std::strtol(p, &end, 10);
    if (end == p) return {};
    long last = first;
    if (*end == '-') {
      p = end + 1;
      last = std::strtol(p, &end, 10);
      if (end == p) return {};
    }
    if (first < 0 || last < first || last >= kMostProcessors) return {};
    for (long cpu = first; cpu <= last; ++cpu) found.push_back(static_cast<int>(cpu));
    if (*end == ',') ++end;
    else if (*end != '\0') return {};
    p = end;
  }
  return found;
}

std::vector<int> fast_processors(const std::string& devices, const std::vector<int>& allowed) {
  std::vector<int> fast = performance_cores(devices, allowed);
  if (fast.empty()) fast = capable_processors(devices, allowed);
  return fast.empty() ? allowed : fast;
}

}  // namespace anymamba
