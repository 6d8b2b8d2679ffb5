"""CUDA without a GPU: fake tensors that show what waits for the device, and a tape that replays like a CUDA graph."""
