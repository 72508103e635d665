// The Python module effnet_ops._C: what was built, what this processor has, which instruction set runs, and
// kernels that are prepared once and run often. Importing it loads the library, and the operators register themselves
// (bindings.cpp). It is a translation unit of its own because pybind11 does not compile where TORCH_TARGET_VERSION is
// defined.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/calibration.h"
#include "cpu/kernels.h"
#include "cpu/step_times.h"
#include "recording.h"

EFFNET_DECLARE_CALIBRATION(baseline)
EFFNET_DECLARE_CALIBRATION(avx2)
EFFNET_DECLARE_CALIBRATION(avx512)
EFFNET_DECLARE_CALIBRATION(avx512_bf16)

namespace {

namespace py = pybind11;
namespace cpu = effnet::cpu;
using cpu::Isa;

std::vector<std::string> isa_names(bool only_supported) {
    int count = 0;
    const Isa* isas = effnet::cpu::isas(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i)
        if (isas[i].supported || !only_supported) names.emplace_back(isas[i].name);
    return names;
}

std::map<std::string, bool> cpu_features() {
    std::map<std::string, bool> features;
#if defined(__x86_64__) || defined(__i386__)
    features["avx2"] = __builtin_cpu_supports("avx2");
    features["fma"] = __builtin_cpu_supports("fma");
    features["avx512f"] = __builtin_cpu_supports("avx512f");
    features["avx512bw"] = __builtin_cpu_supports("avx512bw");
    features["avx512dq"] = __builtin_cpu_supports("avx512dq");
    features["avx512vl"] = __builtin_cpu_supports("avx512vl");
    features["avx512vnni"] = __builtin_cpu_supports("avx512vnni");
#if defined(EFFNET_BUILT_AVX512_BF16)
    features["avx512bf16"] = __builtin_cpu_supports("avx512bf16");
#endif
#endif
    return features;
}

[[noreturn]] void refuse_isa(const std::string& name) {
    std::string known;
    for (const std::string& isa : isa_names(true)) known += (known.empty() ? "" : ", ") + isa;
    throw py::value_error("instruction set '" + name + "' cannot run here (available: " + known + ")");
}

void set_isa(const std::string& name) {
    if (!effnet::cpu::set_isa(name.c_str())) refuse_isa(name);
}

struct MultiplyAdds {
    int64_t (*float32)(int64_t iterations);
    int64_t (*bfloat16)(int64_t iterations);
};

#define EFFNET_MULTIPLY_ADDS(isa)                                                                   \
    {                                                                                               \
        #isa, { effnet::cpu::isa::multiply_adds_float32, effnet::cpu::isa::multiply_adds_bfloat16 } \
    }

const std::map<std::string, MultiplyAdds> multiply_adds_of{
    EFFNET_MULTIPLY_ADDS(baseline),
#if defined(EFFNET_BUILT_AVX2)
    EFFNET_MULTIPLY_ADDS(avx2),
#endif
#if defined(EFFNET_BUILT_AVX512)
    EFFNET_MULTIPLY_ADDS(avx512),
#endif
#if defined(EFFNET_BUILT_AVX512_BF16)
    EFFNET_MULTIPLY_ADDS(avx512_bf16),
#endif
};

int64_t multiply_adds(const std::string& isa, bool bfloat16, int64_t iterations) {
    bool runs = false;
    for (const std::string& name : isa_names(true)) runs = runs || name == isa;
    if (!runs) refuse_isa(isa);
    const MultiplyAdds& loops = multiply_adds_of.at(isa);
    py::gil_scoped_release release;
    return (bfloat16 ? loops.bfloat16 : loops.float32)(iterations);
}

// Seconds and calls of each step of training while `function` runs.
std::map<std::string, std::pair<double, int64_t>> time_steps(const py::function& function) {
    cpu::StepTimes times{};
    cpu::set_step_times(&times);
    try {
        function();
    } catch (...) {
        cpu::set_step_times(nullptr);
        throw;
    }
    cpu::set_step_times(nullptr);
    std::map<std::string, std::pair<double, int64_t>> found;
    for (int i = 0; i < cpu::step_count; ++i)
        if (times.calls[i] != 0) found[cpu::step_names[i]] = {times.seconds[i], times.calls[i]};
    return found;
}

void copy(const py::buffer& destination, const py::buffer& source) {
    const py::buffer_info to = destination.request(true), from = source.request();
    const ssize_t bytes = from.size * from.itemsize;
    if (to.size * to.itemsize != bytes)
        throw py::value_error("destination has " + std::to_string(to.size * to.itemsize) + " bytes, source has " +
                              std::to_string(bytes));
    py::gil_scoped_release release;
    std::memcpy(to.ptr, from.ptr, size_t(bytes));
}

// Never freed: a kernel may call it until the process ends.
py::object& reduce_function() {
    static py::object* const function = new py::object;
    return *function;
}

// Kernels run without the GIL. Their callers are C++, which knows no exception of Python.
void reduce_in_python(const char* group, bool statistics, double* values, int64_t count) {
    py::gil_scoped_acquire gil;
    try {
        reduce_function()(group, statistics, reinterpret_cast<uintptr_t>(values), count);
    } catch (py::error_already_set& error) {
        throw std::runtime_error(std::string(py::str(error.value())));
    }
}

void set_reduce(py::object function) {
    reduce_function() = std::move(function);
    cpu::set_reduce(reduce_in_python);
}

// What a recording led to. Its caller vouches for the memory, and for whatever the steps were made from.
class Prepared {
  public:
    explicit Prepared(std::vector<effnet::Step> steps) : steps_(std::move(steps)) {}
    void run(uintptr_t x, uintptr_t y) const {
        if (x == 0) throw std::invalid_argument("x has no memory: its storage was freed");
        effnet::run_steps(steps_, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y));
    }
    size_t size() const { return steps_.size(); }

  private:
    std::vector<effnet::Step> steps_;
};

std::optional<Prepared> finish(effnet::Recording& recording, uintptr_t x, uintptr_t y) {
    std::vector<effnet::Step> steps =
        recording.finish(reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(y));
    if (steps.empty()) return std::nullopt;
    return Prepared(std::move(steps));
}

// Where in a list of dictionaries, each followed by its keys and values in turn, the dictionaries are. The list is
// Python's and is handed in, so that its garbage collector sees what is held. Between two calls the weights of a
// network have pushed all of this out of the caches, so memory is asked for ahead of its use.
class Places {
  public:
    explicit Places(const py::list& entries) {
        for (Py_ssize_t at = 0; at < PyList_GET_SIZE(entries.ptr());) {
            PyObject* const dictionary = PyList_GET_ITEM(entries.ptr(), at);
            if (!PyDict_Check(dictionary)) throw py::type_error("an entry that must be a dictionary is none");
            places_.push_back(at);
            at += 1 + 2 * PyDict_GET_SIZE(dictionary);
        }
    }
    // Whether each dictionary still has these very objects in this order.
    bool unchanged(const py::list& entries) const {
        constexpr size_t headers_ahead = 24, contents_ahead = 12;
        const auto item = [&](Py_ssize_t at) { return PyList_GET_ITEM(entries.ptr(), at); };
        const auto dictionary = [&](size_t i) { return reinterpret_cast<PyDictObject*>(item(places_[i])); };
        const Py_ssize_t count = PyList_GET_SIZE(entries.ptr());
        for (size_t i = 0; i < places_.size(); ++i) {
            if (i + headers_ahead < places_.size()) __builtin_prefetch(dictionary(i + headers_ahead));
            if (i + contents_ahead < places_.size()) {
                const PyDictObject* const ahead = dictionary(i + contents_ahead);
                __builtin_prefetch(ahead->ma_keys);
                const auto* const values = reinterpret_cast<const char*>(ahead->ma_values);
                for (int line = 0; values != nullptr && line < 4; ++line) __builtin_prefetch(values + 64 * line);
            }
            Py_ssize_t at = places_[i] + 1;
            const Py_ssize_t end = i + 1 < places_.size() ? places_[i + 1] : count;
            PyObject *key = nullptr, *value = nullptr;
            for (Py_ssize_t place = 0; PyDict_Next(item(places_[i]), &place, &key, &value); at += 2)
                if (at + 1 >= end || item(at) != key || item(at + 1) != value) return false;
            if (at != end) return false;
        }
        return true;
    }

  private:
    std::vector<Py_ssize_t> places_;
};

py::dict build_info() {
    py::dict info;
    info["compiler"] = EFFNET_COMPILER;
    info["torch_target"] = EFFNET_TORCH_TARGET;
    info["built_isas"] = isa_names(false);
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build information, instruction-set choice and calibration loops of effnet_ops.";
    m.def("build_info", &build_info, "Compiler, targeted PyTorch version and the instruction sets that were built.");
    m.def("cpu_features", &cpu_features, "Which instruction-set extensions this processor has.");
    m.def(
        "available_isas", [] { return isa_names(true); },
        "The instruction sets that were built and that run here, worst first.");
    m.def("isa", [] { return std::string(effnet::cpu::current_isa().name); }, "The instruction set in use.");
    m.def("set_isa", &set_isa, py::arg("name"),
          "Use another instruction set, for tests; ValueError where it cannot run.");
    m.def(
        "set_reduce", &set_reduce, py::arg("function"),
        "function(group, statistics, address, count): how `count` numbers in float64 at an address become those of all "
        "processes of a group (csrc/cpu/kernels.h).");
    m.def("multiply_adds", &multiply_adds, py::arg("isa"), py::arg("bfloat16"), py::arg("iterations"),
          "Run a loop of independent multiply-adds on this thread, in float32 or with dot products of bfloat16, and "
          "return its floating-point operations; 0, at once, where the instruction set has no such dot product.");
    m.def("time_steps", &time_steps, py::arg("function"),
          "Call function(), and return the seconds and calls of each step of the blocks' training (docs/mbconv.md) in "
          "it. "
          "One thread at a time may train meanwhile.");
    m.def("copy", &copy, py::arg("destination"), py::arg("source"),
          "Copy a contiguous buffer to one of the same size, on this thread.");
    py::class_<Places>(m, "Places", "Where the dictionaries of a snapshot are.")
        .def(py::init<const py::list&>(), py::arg("entries"))
        .def("unchanged", &Places::unchanged, py::arg("entries"),
             "`entries` has dictionaries, each followed by its keys and values in turn, as when this was made: whether "
             "they still hold these very objects in this order.");
    py::class_<effnet::Recording>(m, "Recording", "Keeps what the operators that this thread calls from now on run.")
        .def(py::init<bool>(), py::arg("keep"))
        .def("finish", &finish, py::arg("x"), py::arg("y"),
             "End it. The kernels, prepared to run again, or None where they do not lead from the memory x to y by "
             "themselves.");
    m.def(
        "recording", [] { return effnet::Recording::current() != nullptr; },
        "Whether a recording of this thread has begun and not ended.");
    py::class_<Prepared>(m, "Prepared", "Kernels for one input size, with the addresses of their parameters.")
        .def("run", &Prepared::run, py::arg("x"), py::arg("y"), py::call_guard<py::gil_scoped_release>(),
             "Run on dense tensors at these addresses, in the layouts that were recorded. Nothing is checked.")
        .def("__len__", &Prepared::size, "How many kernels run.");
}
