// Runs from step to step of a block's training. Where nobody measures, it costs a call.
#pragma once

#include "isa.h"
#include "step_times.h"

EFFNET_NAMESPACE_BEGIN

class Stopwatch {
  public:
    // A step ends here, and the next one begins.
    void end(Step step) {
        if (start_ >= 0) start_ = end_step(step, start_);
    }

  private:
    double start_ = begin_step();
};

EFFNET_NAMESPACE_END
