// How long each step of a block's training takes (docs/mbconv.md), added up while somebody measures.
#pragma once

#include <cstdint>

namespace effnet {
namespace cpu {

// Some run as one.
enum class Step { F1, F2, F3_F4, F5, B1_B2, B3, B4, B5 };
constexpr int step_count = 8;
constexpr const char* step_names[step_count] = {"F1", "F2", "F3, F4", "F5", "B1, B2", "B3", "B4", "B5"};

struct StepTimes {
    double seconds[step_count];
    int64_t calls[step_count];
};

// Where to add from now on; null: nowhere. Meanwhile one thread at a time may train.
void set_step_times(StepTimes* to);

// A clock in seconds, negative while nobody measures; at the end of a step its time is added.
double begin_step();
double end_step(Step step, double start);

}  // namespace cpu
}  // namespace effnet
