// Included before everything else in device sources: copies that the compiler leaves to the library go to the
// detectors.
#pragma once

#include <stddef.h>

extern "C" void* memcpy(void*, const void*, size_t) noexcept __asm__("emulation_memcpy");
extern "C" void* memmove(void*, const void*, size_t) noexcept __asm__("emulation_memmove");
extern "C" void* memset(void*, int, size_t) noexcept __asm__("emulation_memset");
