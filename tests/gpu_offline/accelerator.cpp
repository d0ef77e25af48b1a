// Opened before libtorch_cpu: its functions of the same names, which autograd and Inductor call, are then these.
#include <ATen/DeviceAccelerator.h>

namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
bool isAccelerator(c10::DeviceType type) { return type == c10::DeviceType::CUDA; }
}  // namespace at::accelerator
