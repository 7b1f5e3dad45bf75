"""ONNX files of compressed networks: integer weights, and scales that a runtime multiplies them by."""
