// What the compiler calls. -fsanitize=thread reports every access to memory that is not a local variable of its own,
// and the checks of -fsanitize=alignment,bounds,... report what they find; both runtimes are replaced by this file.
#include <cstdint>
#include <cstring>

#include "state.h"

using emulation::access;
using emulation::fail;

#define EMULATION_HOOKS(SIZE)                                                                                     \
    extern "C" void __tsan_read##SIZE(void* p) { access(p, SIZE, false, __builtin_return_address(0)); }           \
    extern "C" void __tsan_write##SIZE(void* p) { access(p, SIZE, true, __builtin_return_address(0)); }           \
    extern "C" void __tsan_unaligned_read##SIZE(void* p) { access(p, SIZE, false, __builtin_return_address(0)); } \
    extern "C" void __tsan_unaligned_write##SIZE(void* p) { access(p, SIZE, true, __builtin_return_address(0)); } \
    extern "C" void __tsan_volatile_read##SIZE(void* p) { access(p, SIZE, false, __builtin_return_address(0)); }  \
    extern "C" void __tsan_volatile_write##SIZE(void* p) { access(p, SIZE, true, __builtin_return_address(0)); }
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)

extern "C" void __tsan_read_range(void* p, size_t size) { access(p, size, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t size) { access(p, size, true, __builtin_return_address(0)); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}

// Copies that the compiler leaves to the library: prelude.h renames them.
extern "C" void* emulation_memcpy(void* to, const void* from, size_t size) {
    access(from, size, false, __builtin_return_address(0));
    access(to, size, true, __builtin_return_address(0));
    return memcpy(to, from, size);
}
extern "C" void* emulation_memmove(void* to, const void* from, size_t size) {
    access(from, size, false, __builtin_return_address(0));
    access(to, size, true, __builtin_return_address(0));
    return memmove(to, from, size);
}
extern "C" void* emulation_memset(void* to, int value, size_t size) {
    access(to, size, true, __builtin_return_address(0));
    return memset(to, value, size);
}

namespace {

// The layouts of GCC's and Clang's undefined behaviour sanitizer.
struct Location {
    const char* file;
    uint32_t line, column;
};
struct Type {
    uint16_t kind, info;
    char name[1];
};
struct Mismatch {
    Location where;
    const Type* type;
    unsigned char log_alignment, kind;
};
struct OutOfBounds {
    Location where;
    const Type *array, *index;
};

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(Mismatch* data, uintptr_t address) {
    const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
    if (address % alignment == 0) return;
    fail(
        "misaligned: an access to %s needs an address that is a multiple of %zu, and 0x%zx is %zu more than one "
        "(%s:%u)",
        data->type->name, size_t(alignment), size_t(address), size_t(address % alignment), data->where.file,
        data->where.line);
}

extern "C" void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
    fail("out of bounds: index %zd of %s (%s:%u)", static_cast<ssize_t>(index), data->array->name, data->where.file,
         data->where.line);
}

#define EMULATION_ARITHMETIC(NAME, WHAT)                                           \
    extern "C" void __ubsan_handle_##NAME(Location* where, uintptr_t, uintptr_t) { \
        fail(WHAT " (%s:%u)", where->file, where->line);                           \
    }
EMULATION_ARITHMETIC(add_overflow, "a sum overflows")
EMULATION_ARITHMETIC(sub_overflow, "a difference overflows")
EMULATION_ARITHMETIC(mul_overflow, "a product overflows")
EMULATION_ARITHMETIC(negate_overflow, "a negation overflows")
EMULATION_ARITHMETIC(divrem_overflow, "a division by zero, or one that overflows")
EMULATION_ARITHMETIC(shift_out_of_bounds, "a shift by a negative number or by all bits")
