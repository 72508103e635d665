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

// body(task, opened) for each task in [0, count), where `open()` runs once on each thread that takes part. A thread
// begins with the tasks that are its share, always the same ones, so that it finds in its cache what it wrote in the
// step before; then it takes what others have left, so that uneven tasks and disturbed threads balance. Results must
// not depend on who runs a task.
template <class Open, class Body>
inline void parallel_tasks(int64_t count, const Open& open, const Body& body) {
    constexpr int64_t most = 256;
    struct alignas(64) Share {
        int64_t next;
    };
    const int64_t shares = smaller(smaller(count, thread_count()), most);
    if (shares <= 1) {
        if (count <= 0) return;
        auto opened = open();
        for (int64_t task = 0; task < count; ++task) body(task, opened);
        return;
    }
    Share next[most];
    for (int64_t s = 0; s < shares; ++s) next[s].next = count * s / shares;
    parallel(shares, [&](int64_t begin, int64_t) {
        auto opened = open();
        for (int64_t turn = 0; turn < shares; ++turn) {
            const int64_t share = (begin + turn) % shares, end = count * (share + 1) / shares;
            for (;;) {
                const int64_t task = __atomic_fetch_add(&next[share].next, 1, __ATOMIC_RELAXED);
                if (task >= end) break;
                body(task, opened);
            }
        }
    });
}

// Memory that a thread keeps between calls: fresh pages cost more than many a kernel. Requests are stacked; one that
// does not fit gets memory of its own, and the stack grows when it is empty again.
class Stack {
  public:
    ~Stack() { std::free(memory_); }
    char* push(size_t bytes) {
        if (depth_ == 0 && wanted_ > size_) grow();
        depth_ += bytes;
        wanted_ = depth_ > wanted_ ? depth_ : wanted_;
#if defined(__SANITIZE_ADDRESS__)
        // Memory of its own for each Scratch: the sanitizer sees no bounds within one block.
        return nullptr;
#else
        return depth_ <= size_ ? memory_ + depth_ - bytes : nullptr;
#endif
    }
    void pop(size_t bytes) { depth_ -= bytes; }

  private:
    static constexpr size_t most = size_t(64) << 20;
    void grow() {
        const size_t huge = size_t(2) << 20;
        const size_t size = size_t(smaller(int64_t(most), round_up(int64_t(wanted_), int64_t(huge))));
        if (size <= size_) return;
        std::free(memory_);
        memory_ = static_cast<char*>(std::aligned_alloc(huge, size));
        size_ = memory_ == nullptr ? 0 : size;
        if (memory_ == nullptr) return;
#if defined(__linux__)
        madvise(memory_, size_, MADV_HUGEPAGE);
#endif
    }
    char* memory_ = nullptr;
    size_t size_ = 0, depth_ = 0, wanted_ = 0;
};

inline Stack& stack() {
    static thread_local Stack own;
    return own;
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

// Uninitialised scratch from the thread's stack: released in reverse order by the thread that took it.
template <class A>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : bytes_(size_t(round_up(larger(count, 1) * int64_t(sizeof(A)), 64))),
          stacked_(stack().push(bytes_)),
          own_(nullptr) {
        if (stacked_ != nullptr) return;
        own_ = static_cast<char*>(std::aligned_alloc(64, bytes_));
        if (own_ != nullptr) return;
        stack().pop(bytes_);
        throw std::bad_alloc();
    }
    ~Scratch() {
        stack().pop(bytes_);
        std::free(own_);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator A*() const { return reinterpret_cast<A*>(own_ == nullptr ? stacked_ : own_); }

  private:
    size_t bytes_;
    char *stacked_, *own_;
};

template <class A>
inline Buffer<A> zeros(int64_t count) {
    Buffer<A> buffer(count);
    std::memset(static_cast<A*>(buffer), 0, size_t(count) * sizeof(A));
    return buffer;
}

EFFNET_NAMESPACE_END
