// torch asks a guard which CUDA device is the current one. Builds of torch for CPUs have none: this one has device 0.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kind = c10::DeviceType::CUDA;

struct OnlyDevice final : c10::impl::NoOpDeviceGuardImpl<kind> {
  c10::Device getDevice() const override { return {kind, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return {kind, 0}; }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, OnlyDevice)
}
