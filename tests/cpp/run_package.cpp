// run_package LIBRARY PACKAGE INPUT OUTPUT BATCH HEIGHT WIDTH: runs an AOTInductor package on (BATCH, 3, HEIGHT, WIDTH)
// floats of the file INPUT, and writes the floats of its first result. LIBRARY is libeffnet_ops.so, whose operators
// PyTorch knows as soon as it is loaded. No Python is there.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read_images(const std::string& path, int64_t batch, int64_t height, int64_t width) {
    at::Tensor x = at::empty({batch, 3, height, width});
    std::ifstream file(path, std::ios::binary);
    file.read(static_cast<char*>(x.data_ptr()), std::streamsize(x.nbytes()));
    if (!file) throw std::runtime_error("cannot read " + path);
    return x;
}

void run(char** argv) {
    if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
    // Without it a package takes any other image for one like the example that it was made with.
    setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    const at::Tensor x = read_images(argv[3], std::stoll(argv[5]), std::stoll(argv[6]), std::stoll(argv[7]));
    const at::Tensor y = model.run({x}).at(0).contiguous();
    std::ofstream file(argv[4], std::ios::binary);
    file.write(static_cast<const char*>(y.data_ptr()), std::streamsize(y.nbytes()));
    bool refused = false;
    try {
        model.run({x.to(at::kDouble)});
    } catch (const std::exception&) {
        refused = true;
    }
    if (!refused) throw std::runtime_error("the package took float64 for float32");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 8) {
        std::cerr << "usage: run_package LIBRARY PACKAGE INPUT OUTPUT BATCH HEIGHT WIDTH\n";
        return 2;
    }
    try {
        run(argv);
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    return 0;
}
