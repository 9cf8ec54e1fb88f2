// What every kernel includes, compiled once for each instruction set.
#include "cpu/kernels/vectors.h"
