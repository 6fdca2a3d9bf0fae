"""ONNX to engine: the bundle on disk, and one builder for each backend."""
