// The Python module effnet_ops._C: what was built, what this processor has, which instruction set runs, and sequences of
// blocks that were looked at once and run often. Importing it loads the library, and the operators register themselves
// (bindings.cpp). It is a translation unit of its own because pybind11 does not compile where TORCH_TARGET_VERSION is
// defined.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cpu/calibration.h"
#include "cpu/kernels.h"

EFFNET_DECLARE_CALIBRATION(baseline)
EFFNET_DECLARE_CALIBRATION(avx2)
EFFNET_DECLARE_CALIBRATION(avx512)
EFFNET_DECLARE_CALIBRATION(avx512_bf16)

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

void copy(const py::buffer& destination, const py::buffer& source) {
    const py::buffer_info to = destination.request(true), from = source.request();
    const ssize_t bytes = from.size * from.itemsize;
    if (to.size * to.itemsize != bytes)
        throw py::value_error("destination has " + std::to_string(to.size * to.itemsize) + " bytes, source has " +
                              std::to_string(bytes));
    py::gil_scoped_release release;
    std::memcpy(to.ptr, from.ptr, size_t(bytes));
}

using Numbers = std::vector<int64_t>;

// Settings and addresses of a block in the order of the structures in kernels.h, taken one after the other.
class BlockNumbers {
  public:
    BlockNumbers(const Numbers& numbers, size_t count) : next_(numbers.begin()) {
        if (numbers.size() != count)
            throw py::value_error("a block takes " + std::to_string(count) + " numbers, got " +
                                  std::to_string(numbers.size()));
    }
    int64_t number() { return *next_++; }
    const void* address() { return reinterpret_cast<const void*>(uintptr_t(*next_++)); }
    effnet::cpu::Activation activation() { return effnet::cpu::Activation(*next_++); }
    effnet::cpu::Gate gate() { return effnet::cpu::Gate(*next_++); }
    effnet::cpu::DepthwiseShape shape() {
        effnet::cpu::DepthwiseShape s;
        for (int64_t* field : {&s.batch, &s.channels, &s.height, &s.width, &s.out_height, &s.out_width, &s.kernel_h,
                               &s.kernel_w, &s.stride_h, &s.stride_w, &s.dilation_h, &s.dilation_w, &s.pad_top,
                               &s.pad_left})
            *field = number();
        return s;
    }

  private:
    Numbers::const_iterator next_;
};

// Blocks with packed weights for one input size: settings and addresses, which the caller vouches for. Such a call does
// not unpack a hundred tensors, which takes PyTorch longer than a small network's convolutions.
class BlockSequence {
  public:
    BlockSequence(int dtype, const std::vector<Numbers>& blocks) : dtype_(effnet::cpu::DType(dtype)) {
        for (const Numbers& numbers : blocks) blocks_.push_back(block_of(numbers));
    }
    void run(uintptr_t x, uintptr_t y) const {
        effnet::cpu::kernels(dtype_).mbconv_sequence(blocks_.data(), int64_t(blocks_.size()),
                                                     reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y));
    }

  private:
    static effnet::cpu::PackedBlock block_of(const Numbers& numbers) {
        BlockNumbers next(numbers, 31);
        effnet::cpu::PackedBlock block{next.shape(), next.number(), next.number(), next.number()};
        block.residual = next.number() != 0;
        block.activation = next.activation();
        block.squeeze_activation = next.activation();
        block.gate = next.gate();
        for (const void** field :
             {&block.expand, &block.expand_bias, &block.depthwise, &block.depthwise_bias, &block.reduce,
              &block.reduce_bias, &block.excite, &block.excite_bias, &block.project, &block.project_bias})
            *field = next.address();
        return block;
    }

    effnet::cpu::DType dtype_;
    std::vector<effnet::cpu::PackedBlock> blocks_;
};

// The same for one block with its weights and normalisations as they are.
class BlockInference {
  public:
    BlockInference(int dtype, const Numbers& numbers, const std::vector<double>& eps)
        : dtype_(effnet::cpu::DType(dtype)) {
        if (eps.size() != 3) throw py::value_error("eps takes 3 numbers, got " + std::to_string(eps.size()));
        BlockNumbers next(numbers, 40);
        block_ = effnet::cpu::Block{next.shape(), next.number(), next.number(), next.number()};
        block_.residual = next.number() != 0;
        effnet::cpu::SqueezeExciteParams& se = block_.squeeze_excite;
        block_.activation = next.activation();
        se.activation = next.activation();
        se.gate = next.gate();
        block_.expand = conv(next, eps[0]);
        block_.depthwise = conv(next, eps[1]);
        for (const void** field : {&se.reduce_weight, &se.reduce_bias, &se.expand_weight, &se.expand_bias})
            *field = next.address();
        block_.project = conv(next, eps[2]);
    }
    void run(uintptr_t x, uintptr_t y) const {
        effnet::cpu::kernels(dtype_).mbconv_inference(block_, reinterpret_cast<const void*>(x),
                                                      reinterpret_cast<void*>(y));
    }

  private:
    static effnet::cpu::ConvNorm conv(BlockNumbers& next, double eps) {
        return {next.address(), next.address(), next.address(), next.address(), next.address(), eps};
    }

    effnet::cpu::DType dtype_;
    effnet::cpu::Block block_{};
};

// `entries` has dictionaries, each followed by its keys and values in turn: whether they still hold the same objects. A
// list of Python's, so that its garbage collector sees what is held.
bool unchanged(const py::list& entries) {
    PyObject* const list = entries.ptr();
    const Py_ssize_t count = PyList_GET_SIZE(list);
    for (Py_ssize_t at = 0; at < count;) {
        PyObject *const dictionary = PyList_GET_ITEM(list, at++), *key = nullptr, *value = nullptr;
        if (!PyDict_Check(dictionary)) return false;
        for (Py_ssize_t place = 0; PyDict_Next(dictionary, &place, &key, &value); at += 2)
            if (at + 1 >= count || PyList_GET_ITEM(list, at) != key || PyList_GET_ITEM(list, at + 1) != value)
                return false;
    }
    return true;
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
    m.doc() = "Build information, instruction-set choice and calibration loops of effnet_ops.";
    m.def("build_info", &build_info, "Compiler, targeted PyTorch version and the instruction sets that were built.");
    m.def("cpu_features", &cpu_features, "Which instruction-set extensions this processor has.");
    m.def(
        "available_isas", [] { return isa_names(true); },
        "The instruction sets that were built and that run here, worst first.");
    m.def("isa", [] { return std::string(effnet::cpu::current_isa().name); }, "The instruction set in use.");
    m.def("set_isa", &set_isa, py::arg("name"),
          "Use another instruction set, for tests; ValueError where it cannot run.");
    m.def("multiply_adds", &multiply_adds, py::arg("isa"), py::arg("bfloat16"), py::arg("iterations"),
          "Run a loop of independent multiply-adds on this thread, in float32 or with dot products of bfloat16, and "
          "return its floating-point operations; 0, at once, where the instruction set has no such dot product.");
    m.def("copy", &copy, py::arg("destination"), py::arg("source"),
          "Copy a contiguous buffer to one of the same size, on this thread.");
    m.def("unchanged", &unchanged, py::arg("entries"),
          "`entries` has dictionaries, each followed by its keys and values in turn: whether they still hold these very "
          "objects in this order.");
    py::class_<BlockSequence>(m, "BlockSequence", "Folded MBConv blocks for one input size, by memory addresses.")
        .def(py::init<int, const std::vector<Numbers>&>(), py::arg("dtype"), py::arg("blocks"),
             "`blocks`: for each the numbers of DepthwiseShape and PackedBlock (csrc/cpu/kernels.h).")
        .def("run", &BlockSequence::run, py::arg("x"), py::arg("y"), py::call_guard<py::gil_scoped_release>(),
             "Run on dense NHWC tensors at these addresses. Nothing is checked.");
    py::class_<BlockInference>(m, "BlockInference", "An MBConv block for one input size, by memory addresses.")
        .def(py::init<int, const Numbers&, const std::vector<double>&>(), py::arg("dtype"), py::arg("numbers"),
             py::arg("eps"), "`numbers`: those of DepthwiseShape and Block (csrc/cpu/kernels.h).")
        .def("run", &BlockInference::run, py::arg("x"), py::arg("y"), py::call_guard<py::gil_scoped_release>(),
             "Run on dense NHWC tensors at these addresses. Nothing is checked.");
}
