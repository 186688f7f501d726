// Selects the instruction set whose kernels run.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace hqq_oft::cpu {

// Compiled kernels that this processor supports, the fastest last.
const std::vector<const Kernels*>& available();

// The selected kernels: the last of `available()`, or what `select` chose.
const Kernels& kernels();

// Selects kernels by name; false if that name is not available.
bool select(const std::string& name);

}  // namespace hqq_oft::cpu
