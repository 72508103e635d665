// Calls of operators that are kept, so that the same calls for other values of x skip all that comes before the
// kernels.
//
// create: the operators of this thread run once while a Recording is current, and each leaves its kernel with the
// structures that it unpacked and checked. run: these kernels, one after the other, on other memory of the same size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace effnet {

// Asks the system for large pages, and glibc to keep what is freed, where y is large: see recording.cpp.
void cheapen_pages(const void* data, size_t bytes);

// A kernel with all that it takes but x and y.
struct Step {
    cpu::DType dtype;
    std::function<void(const cpu::Kernels&, const void* x, void* y)> run;
    size_t bytes;                  // of y
    std::shared_ptr<void> memory;  // what it reads beside x: whoever made that may let it go
};

class Recording {
  public:
    // That of this thread, or null. They nest: what an inner one takes, the outer one gets, too.
    static Recording* current();
    // `keep`: whether steps keep what they read. Else their caller does, and sees to it that it stays where it is.
    explicit Recording(bool keep);
    ~Recording();
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

    // A kernel that read x and wrote y, whose memory is kept until the next one is there: no other tensor has its
    // address.
    void add(Step step, const void* x, const void* y, std::shared_ptr<void> memory);
    // A call that cannot run again by itself, because it copied one of its tensors.
    void spoil() { spoiled_ = true; }
    bool keeps() const { return keeps_; }
    // Ends the recording: the steps, or none where they do not lead from x to y, each reading what the last one wrote.
    std::vector<Step> finish(const void* x, const void* y);

  private:
    struct Entry {
        Step step;
        const void *x, *y;
        std::shared_ptr<void> memory;
    };
    std::vector<Entry> entries_;
    bool spoiled_ = false, open_ = true;
    Recording* outer_;
    bool keeps_;
};

// The steps on x and y; what lies between them is scratch memory.
void run_steps(const std::vector<Step>& steps, const void* x, void* y);

}  // namespace effnet
