"""An emulated Ascend NPU, which stands in for the device and its torch_npu package in tests on a CPU machine."""
