// Threads and scratch memory for the kernels, free of standard-library templates (see isa.h).
#pragma once

#include <cstdlib>
#include <new>

#include "kernels.h"
#include "vec.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

EFFNET_NAMESPACE_BEGIN

// body(begin, end) over [0, count), in contiguous ranges, one a thread.
template <class Body>
inline void parallel(int64_t count, const Body& body) {
    if (count <= 0) return;
    if (count == 1) return body(int64_t(0), int64_t(1));
    parallel_for()(
        count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// Uninitialised, aligned scratch.
template <class A>
class Buffer {
  public:
    explicit Buffer(int64_t count = 0) {
        if (count <= 0) return;
        const size_t huge = size_t(2) << 20;
        const size_t wanted = size_t(count) * sizeof(A);
        const bool large = wanted >= 2 * huge;
        const size_t alignment = large ? huge : 64;
        const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
        data_ = static_cast<A*>(std::aligned_alloc(alignment, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        // Fresh memory of a large tensor is faulted in by pages of 2 MiB instead of 4 KiB.
        if (large) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    ~Buffer() { std::free(data_); }
    Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    operator A*() const { return data_; }
    void swap(Buffer& other) {
        A* const data = data_;
        data_ = other.data_;
        other.data_ = data;
    }

  private:
    A* data_ = nullptr;
};

template <class A>
inline Buffer<A> zeros(int64_t count) {
    Buffer<A> buffer(count);
    std::memset(static_cast<A*>(buffer), 0, size_t(count) * sizeof(A));
    return buffer;
}

EFFNET_NAMESPACE_END
