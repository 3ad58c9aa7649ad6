"""The quantized network as a file, and back: student.safetensors, ONNX, torch.export; its size and work."""
