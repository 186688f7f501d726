// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "types.h"

namespace hqq_oft::cpu {

// Kernels that were compiled and that this processor can run, the fastest last.
const std::vector<const Kernels*>& available();

// Those in force: the last of `available()`, or what `select` chose.
const Kernels& kernels();

// Choose by name; false where there are none of that name.
bool select(const std::string& name);

}  // namespace hqq_oft::cpu
