// The Python module effnet_ops._C: what was built, what this processor has, and which instruction set runs. No operator
// goes through it: importing it loads the library, and the operators register themselves (bindings.cpp). It is a
// translation unit of its own because pybind11 does not compile where TORCH_TARGET_VERSION is defined.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace {

namespace py = pybind11;
using effnet::cpu::Isa;

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

void set_isa(const std::string& name) {
    if (effnet::cpu::set_isa(name.c_str())) return;
    std::string known;
    for (const std::string& isa : isa_names(true)) known += (known.empty() ? "" : ", ") + isa;
    throw py::value_error("instruction set '" + name + "' cannot run here (available: " + known + ")");
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = EFFNET_COMPILER;
    info["torch_target"] = EFFNET_TORCH_TARGET;
    info["built_isas"] = isa_names(false);
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build information and instruction-set choice of effnet_ops.";
    m.def("build_info", &build_info, "Compiler, targeted PyTorch version and the instruction sets that were built.");
    m.def("cpu_features", &cpu_features, "Which instruction-set extensions this processor has.");
    m.def(
        "available_isas", [] { return isa_names(true); },
        "The instruction sets that were built and that run here, worst first.");
    m.def("isa", [] { return std::string(effnet::cpu::current_isa().name); }, "The instruction set in use.");
    m.def("set_isa", &set_isa, py::arg("name"),
          "Use another instruction set, for tests; ValueError where it cannot run.");
}
