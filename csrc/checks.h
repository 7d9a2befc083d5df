// Host checks of the bindings. A failed one raises RuntimeError with the file, the line, the condition and the reason.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define IGRPO_CHECK(condition, ...) \
  STD_TORCH_CHECK(condition, __FILE__, ":", __LINE__, ": ", #condition, " is false: ", __VA_ARGS__)

#define IGRPO_UNREACHABLE(what) STD_TORCH_CHECK(false, __FILE__, ":", __LINE__, ": unreachable: ", what)

#define IGRPO_CHECK_DTYPE(x, type)                                                      \
  IGRPO_CHECK((x).scalar_type() == torch::headeronly::ScalarType::type, "tensor " #x " must be " #type)

// A contiguous tensor of `count` elements on the same device as `like`.
#define IGRPO_CHECK_VECTOR(x, count, like)                                                               \
  IGRPO_CHECK((x).numel() == (count) && (x).is_contiguous(), "tensor " #x " must be contiguous with ", (count), \
              " elements, it has ", (x).numel());                                                        \
  IGRPO_CHECK((x).device() == (like).device(), "tensors " #x " and " #like " must be on one device")
