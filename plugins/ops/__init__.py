"""The ops that carry a model, a folder each: what an op is (`op`), its ONNX body, and its torch face."""
