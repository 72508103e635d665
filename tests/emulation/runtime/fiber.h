// A second stack to run on. Switching costs a few nanoseconds where this knows the processor, and a system call
// elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)

class Fiber {
  public:
    // `entry` must not return.
    void prepare(unsigned char* stack, size_t size, void (*entry)()) {
        void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
        *--top = nullptr;  // what the entry believes to be its return address
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        stack_pointer = top;
    }
    static void swap(Fiber& from, Fiber& to);

  private:
    void* stack_pointer = nullptr;
};

#else

class Fiber {
  public:
    void prepare(unsigned char* stack, size_t size, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void swap(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

  private:
    ucontext_t context;
};

#endif

}  // namespace emulation
