// Which processors are fast, by the files in which Linux says so.
#pragma once

#include <string>
#include <vector>

namespace anymamba {

// The numbers in a list such as "0-3,8,10-11"; none if it is not one.
std::vector<int> processor_list(const std::string& text);

// Those of `allowed` that are not efficiency cores; all of them where nothing is said. `devices` is
// the folder /sys/devices.
std::vector<int> fast_processors(const std::string& devices, const std::vector<int>& allowed);

}  // namespace anymamba
