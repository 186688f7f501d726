// The kernels of one instruction set: a translation unit defines HQQ_OFT_ISA, includes its vectors, then this.
//
// Everything is in a namespace of that name and local to the translation unit, and nothing of the standard library's
// templates is used: a function that the linker could share with other units would carry these instructions to machines
// that do not have them.
#pragma once

#include "convert.h"
#include "multiply.h"
#include "rotate.h"
#include "decode.h"
#include "product.h"
#include "cayley.h"
