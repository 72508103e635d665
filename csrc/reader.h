// The arguments of an operator, taken from PyTorch's stack one after the other in the order of the schema, which
// effnet_ops/ops/calls.py derives from the operator's call. Through the LibTorch stable ABI alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "stable.h"

namespace effnet {

using OptionalTensor = std::optional<Tensor>;

// Everything must be taken before anything can fail: what is left on the stack is never released.
class Reader {
  public:
    Reader(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}
    Tensor tensor() { return take<Tensor>(); }
    OptionalTensor optional() { return take<OptionalTensor>(); }
    Ints numbers() { return take<Ints>(); }
    double real() { return take<double>(); }
    bool flag() { return take<bool>(); }
    Needs flags() { return take<Needs>(); }
    std::string name() { return take<std::string>(); }
    bool finished() const { return next_ == end_; }

  private:
    template <class T>
    T take() {
        STD_TORCH_CHECK(next_ != end_, "the operator was defined with fewer arguments than its kernel reads");
        return torch::stable::detail::to<T>(*next_++);
    }
    StableIValue *next_, *end_;
};

// A function of a Reader as PyTorch calls a kernel.
template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t count) {
    Reader in(stack, arguments);
    const std::vector<Tensor> results = function(in);
    STD_TORCH_CHECK(in.finished() && results.size() == count, "the operator's schema is not that of its kernel");
    for (size_t i = 0; i < results.size(); ++i) stack[i] = torch::stable::detail::from(results[i]);
}

}  // namespace effnet
