"""sdrt: Stable Diffusion v1 as ONNX and TensorRT engines, with a numpy runtime free of PyTorch."""
