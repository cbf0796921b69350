// An emulated Ascend NPU for tests: the "npu" device of PyTorch, played by the host's memory and CPU kernels.
//
// Every storage of an emulated device owns a CPU storage with the same bytes (see Block). An operator is run by
// aliasing its device tensors as CPU tensors, calling the CPU kernel, and wrapping what is new as device tensors;
// nothing is copied. Collectives do the same with a gloo process group. Nothing here imitates the speed, the rounding
// or the memory limits of an NPU. What is imitated are the rules a program meets: devices have indices and their own
// random state, tensors of different devices do not mix, memory is counted, and HCCL knows no average.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue_inl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

#if __has_include(<ATen/core/Dimname.h>)
using at::DimnameList; // a macro of earlier PyTorch names it without its namespace
#endif
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Storage;
using c10::Stream;
using c10::StreamId;

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 16; // as many as the largest Ascend server has
constexpr size_t kTotalBytes = size_t(64) << 30; // what mem_get_info says that a device has

// ---------------------------------------------------------------------------------------------------------- devices

// How many devices there are: EMULATED_NPU_COUNT, of which ASCEND_RT_VISIBLE_DEVICES may choose some ("0,2"). As on the
// real thing, the list ends at the first number that is no device.
DeviceIndex count_devices() {
  const char* text = std::getenv("EMULATED_NPU_COUNT");
  const int present = std::min(text ? std::atoi(text) : 2, kMaxDevices);
  const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible) {
    return static_cast<DeviceIndex>(std::max(present, 0));
  }
  std::stringstream numbers(visible);
  DeviceIndex count = 0;
  for (std::string number; std::getline(numbers, number, ','); ++count) {
    if (number.find_first_not_of(" 0123456789") != std::string::npos || std::atoi(number.c_str()) >= present) {
      break;
    }
  }
  return count;
}

DeviceIndex device_count() {
  static const DeviceIndex count = count_devices();
  return count;
}

thread_local DeviceIndex current_device = 0;
thread_local StreamId current_streams[kMaxDevices] = {};

DeviceIndex checked(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count(), "Invalid device npu:", int(index), ": ", int(device_count()),
              " emulated NPUs are visible.");
  return index;
}

Device resolve(std::optional<Device> device) {
  return Device(kNpu, checked(device && device->has_index() ? device->index() : current_device));
}

DeviceIndex exchange_device(DeviceIndex index) {
  const auto before = current_device;
  current_device = checked(index);
  return before;
}

// Work is done when a call returns, so that streams are names only and events remember when they were recorded.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Clock = std::chrono::steady_clock;

  c10::DeviceType type() const override { return kNpu; }
  Device exchangeDevice(Device device) const override { return Device(kNpu, exchange_device(device.index())); }
  Device getDevice() const override { return Device(kNpu, current_device); }
  void setDevice(Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }

  Stream getStream(Device device) const override {
    device = resolve(device);
    return Stream(Stream::UNSAFE, device, current_streams[device.index()]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, resolve(device)); }
  Stream getNewStream(Device device, int = 0) const override {
    static std::atomic<StreamId> last{0};
    return Stream(Stream::UNSAFE, resolve(device), ++last);
  }
  Stream getStreamFromGlobalPool(Device device, bool = false) const override { return getNewStream(device); }
  Stream exchangeStream(Stream stream) const override {
    const auto before = getStream(stream.device());
    current_streams[before.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}

  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    delete static_cast<Clock::time_point*>(*event);
    *event = new Clock::time_point(Clock::now());
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* start, void* end, const DeviceIndex) const override {
    const auto duration = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
    return std::chrono::duration<double, std::milli>(duration).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ----------------------------------------------------------------------------------------------------------- memory

// What a device storage's pointer owns: the CPU storage that plays device memory.
struct Block {
  Storage host;
  DeviceIndex device;
  size_t bytes;
};

class Memory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    return hold(Storage(Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), /*resizable=*/true), current_device);
  }

  // Device memory made of a CPU storage, counted from now on.
  c10::DataPtr hold(Storage host, DeviceIndex device) {
    void* data = host.mutable_data();
    const auto bytes = host.nbytes();
    count(device, [&](auto& stat) { stat.increase(bytes); });
    return {data, new Block{std::move(host), device, bytes}, &release, Device(kNpu, device)};
  }

  // The CPU storage that plays a device storage.
  static Storage host(const Storage& storage) {
    auto& pointer = storage.data_ptr();
    if (pointer && pointer.get_deleter() != &release) { // from_blob: memory of somebody else
      const auto forget = [](void* owner) { delete static_cast<Storage*>(owner); };
      c10::DataPtr borrowed(pointer.get(), new Storage(storage), forget, Device(c10::DeviceType::CPU));
      return Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(borrowed), nullptr, false);
    }
    if (!pointer.get_context()) { // never allocated, or emptied by a resize to nothing
      storage.unsafeGetStorageImpl()->set_data_ptr_noswap(memory().hold(
          Storage(Storage::use_byte_size_t(), 0, c10::GetCPUAllocator(), true), storage.device().index()));
    }
    return static_cast<Block*>(storage.data_ptr().get_context())->host;
  }

  static Memory& memory() {
    static auto* memory = new Memory; // never destroyed: tensors may outlive it at exit
    return *memory;
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr&, Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    count(device, [&](auto& stat) {
      stats.allocated_bytes[0] = stats.reserved_bytes[0] = stats.active_bytes[0] = stat;
    });
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    count(device, [](auto& stat) { stat.reset_accumulated(); });
  }
  void resetPeakStats(DeviceIndex device) override {
    count(device, [](auto& stat) { stat.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    size_t used = 0;
    count(device, [&](auto& stat) { used = stat.current; });
    return {kTotalBytes - std::min(used, kTotalBytes), kTotalBytes};
  }

 private:
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    memory().count(block->device, [&](auto& stat) { stat.decrease(block->bytes); });
    delete block;
  }

  template <class Change>
  void count(DeviceIndex device, Change change) {
    const std::lock_guard lock(mutex_);
    change(bytes_[checked(device)]);
  }

  std::mutex mutex_;
  c10::CachingAllocator::Stat bytes_[kMaxDevices];
};

// Pinned host memory is ordinary memory whose addresses are remembered.
class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* owner = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    const std::lock_guard lock(mutex_);
    pinned_.insert(owner->get());
    return {owner->get(), owner, &release, Device(c10::DeviceType::CPU)};
  }
  bool owns(const void* data) {
    const std::lock_guard lock(mutex_);
    return pinned_.count(data) > 0;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  static PinnedMemory& memory() {
    static auto* memory = new PinnedMemory;
    return *memory;
  }

 private:
  static void release(void* context) {
    auto* owner = static_cast<c10::DataPtr*>(context);
    {
      const std::lock_guard lock(memory().mutex_);
      memory().pinned_.erase(owner->get());
    }
    delete owner;
  }

  std::mutex mutex_;
  std::unordered_set<const void*> pinned_;
};

// ----------------------------------------------------------------------------------------------------- random state

struct NpuGenerator final : at::CPUGeneratorImpl {
  explicit NpuGenerator(DeviceIndex device) {
    device_ = Device(kNpu, device);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

const at::Generator& default_generator(DeviceIndex device) {
  static auto* generators = [] {
    auto* all = new std::vector<at::Generator>;
    for (DeviceIndex index = 0; index < device_count(); ++index) {
      all->push_back(at::make_generator<NpuGenerator>(index));
    }
    return all;
  }();
  return (*generators)[checked(device < 0 ? current_device : device)];
}

// Lets CPU kernels draw from a device's generator: not all that draw take a generator, so the default one lends its
// place.
class Drawing {
 public:
  explicit Drawing(at::Generator generator)
      : lock_(mutex()), cpu_(at::detail::getDefaultCPUGenerator()), generator_(std::move(generator)), kept_(get(cpu_)) {
    move(generator_, cpu_);
  }
  ~Drawing() {
    move(cpu_, generator_);
    set(cpu_, kept_);
  }

 private:
  static std::mutex& mutex() { // devices have a backward thread each
    static std::mutex mutex;
    return mutex;
  }
  static Tensor get(at::Generator& from) {
    const std::lock_guard lock(from.mutex());
    return from.get_state();
  }
  static void set(at::Generator& to, const Tensor& state) {
    const std::lock_guard lock(to.mutex());
    to.set_state(state);
  }
  static void move(at::Generator& from, at::Generator& to) { set(to, get(from)); }

  std::lock_guard<std::mutex> lock_;
  at::Generator cpu_, generator_;
  Tensor kept_;
};

// ------------------------------------------------------------------------------------------------------------ hooks

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override { exchange_device(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return exchange_device(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchange_device(device); }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<NpuGenerator>(checked(device < 0 ? current_device : device));
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::memory(); }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::memory().owns(data); }
  Device getDeviceFromPtr(void*) const override { return Device(kNpu, current_device); }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

// -------------------------------------------------------------------------------------------------------- operators

// The CPU tensor with a device tensor's memory, shape and view bits.
Tensor host_alias(const Tensor& tensor) {
  TORCH_CHECK(tensor.layout() == c10::kStrided, "The emulated NPU has no ", tensor.layout(), " tensors.");
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      Memory::host(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  alias._set_conj(tensor.is_conj());
  alias._set_neg(tensor.is_neg());
  return alias;
}

// The tensors of one operator call, between the device and the CPU.
class Call {
 public:
  // An argument as the CPU kernel shall see it.
  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) {
      return to_host(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) {
        list.push_back(to_host(tensor));
      }
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional(to_host(*tensor)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kNpu) {
      device_ = resolve(value.toDevice());
      return Device(c10::DeviceType::CPU);
    }
    if (value.isGenerator() && value.toGenerator().device().type() == kNpu) {
      generator_ = value.toGenerator();
      return {};
    }
    return value;
  }

  // A result as the caller shall see it.
  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) {
      return to_device(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) {
        list.push_back(to_device(tensor));
      }
      return list;
    }
    return value;
  }

  // Tensors of one device only, but for numbers in CPU tensors; indices may come from the CPU.
  void check_devices(const std::string& name) const {
    static const std::unordered_set<std::string> indexing = {
        "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
    TORCH_CHECK(!stranger_ || !device_ || (stranger_->is_cpu() && indexing.count(name)),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                device_.value_or(Device(kNpu)), " and ", *stranger_, "! (when checking arguments of ", name, ")");
  }

  at::Generator generator() const { return generator_.defined() ? generator_ : default_generator(device().index()); }
  bool has_generator() const { return generator_.defined(); }

  // Carries over what the kernel did to its arguments besides writing values: new memory, storages and shapes.
  void update_arguments() {
    for (auto& [host, device] : storages_) {
      if (device.data() != host->data() || device.nbytes() != host->nbytes()) {
        auto* impl = device.unsafeGetStorageImpl();
        impl->set_data_ptr_noswap(Memory::memory().hold(
            Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(host)), device.device().index()));
        impl->set_nbytes(host->nbytes());
      }
    }
    for (auto& [tensor, alias] : aliases_) {
      auto* impl = tensor;
      if (alias.storage().unsafeGetStorageImpl() != hosts_[impl]) {
        impl->set_storage_keep_dtype(device_storage(alias.storage()));
      }
      if (impl->sizes() != alias.sizes() || impl->strides() != alias.strides() ||
          impl->storage_offset() != alias.storage_offset()) {
        impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
      }
    }
  }

 private:
  Device device() const { return device_.value_or(Device(kNpu, current_device)); }

  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (tensor.device().type() != kNpu) {
      if (tensor.dim() > 0) {
        stranger_ = tensor.device();
      }
      return tensor;
    }
    if (!device_) {
      device_ = tensor.device();
    } else if (*device_ != tensor.device()) {
      stranger_ = tensor.device();
    }
    auto [found, is_new] = aliases_.try_emplace(tensor.unsafeGetTensorImpl());
    if (is_new) {
      found->second = host_alias(tensor);
      auto* host = found->second.storage().unsafeGetStorageImpl();
      storages_.emplace(host, tensor.storage());
      hosts_[tensor.unsafeGetTensorImpl()] = host;
      tensors_.emplace(found->second.unsafeGetTensorImpl(), tensor);
    }
    return found->second;
  }

  Storage device_storage(const Storage& host) {
    auto found = storages_.find(host.unsafeGetStorageImpl());
    if (found == storages_.end()) {
      auto pointer = Memory::memory().hold(host, device().index());
      Storage storage(Storage::use_byte_size_t(), host.nbytes(), std::move(pointer), &Memory::memory(), true);
      found = storages_.emplace(host.unsafeGetStorageImpl(), std::move(storage)).first;
    }
    return found->second;
  }

  Tensor to_device(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu() || tensor.layout() != c10::kStrided) {
      return tensor;
    }
    if (auto found = tensors_.find(tensor.unsafeGetTensorImpl()); found != tensors_.end()) {
      return found->second; // an in-place or out operator returns its argument
    }
    auto result = at::detail::make_tensor<c10::TensorImpl>(
        device_storage(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), tensor.dtype());
    result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    result._set_conj(tensor.is_conj());
    result._set_neg(tensor.is_neg());
    return result;
  }

  std::optional<Device> device_, stranger_;
  at::Generator generator_;
  std::unordered_map<c10::TensorImpl*, Tensor> aliases_; // device tensor -> its CPU alias
  std::unordered_map<c10::TensorImpl*, c10::StorageImpl*> hosts_; // device tensor -> its CPU storage before the call
  std::unordered_map<c10::TensorImpl*, Tensor> tensors_; // CPU alias -> device tensor
  std::unordered_map<c10::StorageImpl*, Storage> storages_; // CPU storage -> device storage
};

// Runs any operator by its CPU kernel.
void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Call call;
  const auto& schema = op.schema();
  for (auto& argument : torch::jit::last(*stack, schema.arguments().size())) {
    const_cast<c10::IValue&>(argument) = call.to_host(argument);
  }
  call.check_devices(schema.name());
  {
    std::optional<Drawing> drawing;
    if (call.has_generator() || op.hasTag(at::Tag::nondeterministic_seeded)) {
      drawing.emplace(call.generator());
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.update_arguments();
  for (auto& result : torch::jit::last(*stack, schema.returns().size())) {
    const_cast<c10::IValue&>(result) = call.to_device(result);
  }
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(layout.value_or(c10::kStrided) == c10::kStrided, "The emulated NPU has strided tensors only.");
  const c10::DeviceGuard guard(resolve(device));
  return at::detail::empty_generic(size, &Memory::memory(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout> layout, std::optional<Device> device, std::optional<bool>) {
  TORCH_CHECK(layout.value_or(c10::kStrided) == c10::kStrided, "The emulated NPU has strided tensors only.");
  const c10::DeviceGuard guard(resolve(device));
  return at::detail::empty_strided_generic(size, stride, &Memory::memory(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

Tensor& set_storage_(Tensor& self, Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  const c10::DeviceGuard guard(self.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_(Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  return set_storage_(self, Storage(Storage::use_byte_size_t(), 0, &Memory::memory(), true), 0, {0}, {});
}

// What copy_ calls where a tensor is on this device: both sides may be, of any index.
Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  const auto host = [](const Tensor& tensor) { return tensor.device().type() == kNpu ? host_alias(tensor) : tensor; };
  host(to).copy_(host(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

void record_stream(Tensor&, Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(&at::native::view));
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &set_storage_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("record_stream", &record_stream);
  // Composite operators that would choose among the backends PyTorch knows; the CPU's choice is what is wanted.
  for (const auto* name : {"convolution", "convolution_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

// copy_ leaves conjugate and negative views to the copying kernel, and so must what it calls here.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// Mixed precision with the lists of operators that PyTorch has for CUDA, which accelerators share.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using c10::IntArrayRef, c10::Scalar, c10::ScalarType; // which the lists name so
#define IN_HALF(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define TO_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_HALF)
  AT_FORALL_FP32(IN_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(TO_FP32)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(PROMOTE)
}

// ------------------------------------------------------------------------------------------------------ collectives

using Work = c10::intrusive_ptr<c10d::Work>;
using Tensors = std::vector<Tensor>;

// Gloo's work, with the device tensors for results.
class EmulatedHcclWork final : public c10d::Work {
 public:
  EmulatedHcclWork(c10::intrusive_ptr<c10d::Work> gloo, Tensors outputs)
      : gloo_(std::move(gloo)), outputs_(std::move(outputs)) {}

  bool isCompleted() override { return gloo_->isCompleted(); }
  bool isSuccess() const override { return gloo_->isSuccess(); }
  std::exception_ptr exception() const override { return gloo_->exception(); }
  int sourceRank() const override { return gloo_->sourceRank(); }
  Tensors result() override { return outputs_; }
  void synchronize() override { gloo_->wait(); }
  bool wait(std::chrono::milliseconds timeout) override { return gloo_->wait(timeout); }
  void blockCurrentStream() override { gloo_->wait(); }
  void abort() override { gloo_->abort(); }
  uint64_t getSequencenumber() const override { return gloo_->getSequencenumber(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    std::vector<Device> devices;
    for (const auto& tensor : outputs_) {
      if (std::find(devices.begin(), devices.end(), tensor.device()) == devices.end()) {
        devices.push_back(tensor.device());
      }
    }
    auto future =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), std::move(devices));
    gloo_->getFuture()->addCallback([future, outputs = outputs_](c10::ivalue::Future& gloo) {
      if (gloo.hasError()) {
        future->setError(gloo.exception_ptr());
      } else {
        future->markCompleted(c10::IValue(outputs));
      }
    });
    return future;
  }

 private:
  c10::intrusive_ptr<c10d::Work> gloo_;
  Tensors outputs_;
};

// Gloo under HCCL's name and rules.
class EmulatedHCCL final : public c10d::Backend {
 public:
  explicit EmulatedHCCL(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "hccl"; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }
  c10::intrusive_ptr<Options> getBackendOptions() override { return gloo_->getBackendOptions(); }
  void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }
  void enableCollectivesTiming() override { gloo_->enableCollectivesTiming(); }
  void abort() override { gloo_->abort(); }
  void shutdown() override { gloo_->shutdown(); }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override {
    auto hosts = on_host(tensors);
    return work(gloo_->broadcast(hosts, opts), tensors);
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override {
    check(opts.reduceOp);
    auto hosts = on_host(tensors);
    return work(gloo_->allreduce(hosts, opts), tensors);
  }
  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) override {
    check(opts.reduceOp);
    auto hosts = on_host(tensors);
    return work(gloo_->allreduce_coalesced(hosts, opts), tensors);
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override {
    check(opts.reduceOp);
    auto hosts = on_host(tensors);
    return work(gloo_->reduce(hosts, opts), tensors);
  }
  Work allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) override {
    auto hosts = on_host(inputs);
    auto host_outputs = on_host(outputs);
    return work(gloo_->allgather(host_outputs, hosts, opts), outputs.at(0));
  }
  Work _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& opts) override {
    auto host = on_host(input), host_output = on_host(output);
    return work(gloo_->_allgather_base(host_output, host, opts), {output});
  }
  Work allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                           const c10d::AllgatherOptions& opts) override {
    auto hosts = on_host(inputs);
    auto host_outputs = on_host(outputs);
    return work(gloo_->allgather_coalesced(host_outputs, hosts, opts), outputs.at(0));
  }
  Work allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::AllgatherOptions& opts) override {
    auto hosts = on_host(inputs), host_outputs = on_host(outputs);
    return work(gloo_->allgather_into_tensor_coalesced(host_outputs, hosts, opts), outputs);
  }
  Work gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts) override {
    auto hosts = on_host(inputs);
    auto host_outputs = on_host(outputs);
    return work(gloo_->gather(host_outputs, hosts, opts), outputs.empty() ? Tensors() : outputs[0]);
  }
  Work scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts) override {
    auto host_outputs = on_host(outputs);
    auto hosts = on_host(inputs);
    return work(gloo_->scatter(host_outputs, hosts, opts), outputs);
  }
  Work reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                      const c10d::ReduceScatterOptions& opts) override {
    check(opts.reduceOp);
    auto host_outputs = on_host(outputs);
    auto hosts = on_host(inputs);
    return work(gloo_->reduce_scatter(host_outputs, hosts, opts), outputs);
  }
  Work _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& opts) override {
    check(opts.reduceOp);
    auto host = on_host(input), host_output = on_host(output);
    return work(gloo_->_reduce_scatter_base(host_output, host, opts), {output});
  }
  Work reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::ReduceScatterOptions& opts) override {
    check(opts.reduceOp);
    auto hosts = on_host(inputs), host_outputs = on_host(outputs);
    return work(gloo_->reduce_scatter_tensor_coalesced(host_outputs, hosts, opts), outputs);
  }
  Work alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_sizes,
                     std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& opts) override {
    auto host = on_host(input), host_output = on_host(output);
    return work(gloo_->alltoall_base(host_output, host, output_sizes, input_sizes, opts), {output});
  }
  Work alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) override {
    auto hosts = on_host(inputs), host_outputs = on_host(outputs);
    return work(gloo_->alltoall(host_outputs, hosts, opts), outputs);
  }
  Work send(Tensors& tensors, int rank, int tag) override {
    auto hosts = on_host(tensors);
    return work(gloo_->send(hosts, rank, tag), {});
  }
  Work recv(Tensors& tensors, int rank, int tag) override {
    auto hosts = on_host(tensors);
    return work(gloo_->recv(hosts, rank, tag), tensors);
  }
  Work recvAnysource(Tensors& tensors, int tag) override {
    auto hosts = on_host(tensors);
    return work(gloo_->recvAnysource(hosts, tag), tensors);
  }
  Work barrier(const c10d::BarrierOptions& opts) override { return work(gloo_->barrier(opts), {}); }

 private:
  static Work work(Work gloo, Tensors outputs) {
    return c10::make_intrusive<EmulatedHcclWork>(std::move(gloo), std::move(outputs));
  }
  static void check(const c10d::ReduceOp& op) {
    TORCH_CHECK(op == c10d::ReduceOp::SUM || op == c10d::ReduceOp::PRODUCT || op == c10d::ReduceOp::MIN ||
                    op == c10d::ReduceOp::MAX,
                "HCCL (emulated) reduces by SUM, PRODUCT, MIN and MAX only; it has no AVG.");
  }
  static Tensor on_host(const Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == kNpu, "HCCL (emulated) takes npu tensors, not ", tensor.device(), " ones.");
    return host_alias(tensor);
  }
  static Tensors on_host(const Tensors& tensors) {
    Tensors hosts;
    for (const auto& tensor : tensors) {
      hosts.push_back(on_host(tensor));
    }
    return hosts;
  }
  static std::vector<Tensors> on_host(const std::vector<Tensors>& lists) {
    std::vector<Tensors> hosts;
    for (const auto& tensors : lists) {
      hosts.push_back(on_host(tensors));
    }
    return hosts;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

} // namespace

PYBIND11_MODULE(_emulated_npu, m) {
  c10::SetAllocator(kNpu, &Memory::memory());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("device_count", &device_count);
  m.def("current_device", [] { return current_device; });
  m.def("exchange_device", &exchange_device);
  m.def("default_generator", &default_generator);
  m.def("emulated_hccl", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<EmulatedHCCL>(std::move(gloo));
  });
}
