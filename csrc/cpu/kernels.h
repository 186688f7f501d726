// The kernels of one instruction set: a translation unit defines HQQ_OFT_ISA, includes its vectors, then this.
//
// Everything is in a namespace of that name and local to the translation unit, and no standard library templates are
// used: the linker could merge their instances with those of other units, which would then execute unsupported
// instructions on older processors.
#pragma once

#include "convert.h"
#include "multiply.h"
#include "rotate.h"
#include "decode.h"
#include "product.h"
#include "cayley.h"
#include "quantize.h"
