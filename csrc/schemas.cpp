// The schemas of the operators, for programs in C++ (libeffnet_ops.so). In Python they are derived from the calls
// (effnet_ops/ops/calls.py) and defined there; tests/test_cpp.py compares the two.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(effnet_ops, m) {
    m.def(
        "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, str activation) -> Tensor");
    m.def(
        "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, str activation, bool[] needs) -> (Tensor, Tensor, Tensor)");
    m.def(
        "pointwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> Tensor");
    m.def(
        "pointwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool[] needs) -> (Tensor, Tensor, Tensor)");
    m.def(
        "squeeze_excite(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, str activation, str gate) -> (Tensor, Tensor)");
    m.def(
        "squeeze_excite_backward(Tensor grad, Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias, str activation, str gate, Tensor pooled, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "mbconv_inference(Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor? depthwise_mean, Tensor? depthwise_var, float depthwise_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation) -> Tensor");
    m.def(
        "mbconv_packed(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor depthwise_bias, Tensor? reduce_weight, Tensor? reduce_bias, Tensor? excite_weight, Tensor? excite_bias, Tensor project_weight, Tensor project_bias, int[] stride, int[] padding, bool residual, str activation, str squeeze_activation, str gate) -> Tensor");
    m.def(
        "fused_mbconv_inference(Tensor x, Tensor expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor? project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation) -> Tensor");
    m.def(
        "fused_mbconv_packed(Tensor x, Tensor expand_weight, Tensor expand_bias, Tensor? reduce_weight, Tensor? reduce_bias, Tensor? excite_weight, Tensor? excite_bias, Tensor? project_weight, Tensor? project_bias, int[] kernel, int[] stride, int[] padding, bool residual, str activation, str squeeze_activation, str gate) -> Tensor");
    m.def(
        "average_pool(Tensor x, bool keepdim) -> Tensor");
    m.def(
        "pointwise_packed(Tensor x, Tensor weight, Tensor bias, str activation) -> Tensor");
    m.def(
        "convolution_packed(Tensor x, Tensor weight, Tensor bias, int[] kernel, int[] stride, int[] padding, str activation) -> Tensor");
    m.def(
        "batch_norm_inference(Tensor x, Tensor gamma, Tensor? beta, Tensor mean, Tensor var, float eps, str activation) -> Tensor");
    m.def(
        "batch_norm_training(Tensor x, Tensor gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, str activation) -> (Tensor, Tensor, Tensor)");
    m.def(
        "batch_norm_backward(Tensor grad, Tensor x, Tensor gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, str activation, Tensor mean_used, Tensor var_used, bool[] needs) -> (Tensor, Tensor, Tensor)");
    m.def(
        "conv_norm_inference(Tensor x, Tensor conv_weight, Tensor? conv_gamma, Tensor? conv_beta, Tensor? conv_mean, Tensor? conv_var, float conv_eps, int[] stride, int[] padding, str activation) -> Tensor");
    m.def(
        "mbconv_training(Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor? depthwise_mean, Tensor? depthwise_var, float depthwise_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation, bool save_expanded) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "mbconv_backward(Tensor grad, Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor? depthwise_mean, Tensor? depthwise_var, float depthwise_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation, Tensor expanded, Tensor convolved, Tensor projected, Tensor expand_mean_used, Tensor expand_var_used, Tensor depthwise_mean_used, Tensor depthwise_var_used, Tensor project_mean_used, Tensor project_var_used, Tensor pooled, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "fused_mbconv_training(Tensor x, Tensor expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor? project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation, bool save_expanded) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "fused_mbconv_backward(Tensor grad, Tensor x, Tensor expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor? project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation, Tensor expanded, Tensor projected, Tensor expand_mean_used, Tensor expand_var_used, Tensor project_mean_used, Tensor project_var_used, Tensor pooled, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "mbconv_sync_training(Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor? depthwise_mean, Tensor? depthwise_var, float depthwise_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation, bool save_expanded, str process_group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "mbconv_sync_backward(Tensor grad, Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, float expand_eps, Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor? depthwise_mean, Tensor? depthwise_var, float depthwise_eps, Tensor? squeeze_excite_reduce_weight, Tensor? squeeze_excite_reduce_bias, Tensor? squeeze_excite_expand_weight, Tensor? squeeze_excite_expand_bias, str squeeze_excite_activation, str squeeze_excite_gate, Tensor project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, float project_eps, Tensor? drop_path, int[] stride, int[] padding, bool residual, str activation, Tensor expanded, Tensor convolved, Tensor projected, Tensor expand_mean_used, Tensor expand_var_used, Tensor depthwise_mean_used, Tensor depthwise_var_used, Tensor project_mean_used, Tensor project_var_used, Tensor pooled, Tensor counts, str process_group, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
// clang-format on
