"""ONNX files of compressed networks, with integer weights and with scales that a runtime multiplies them by."""
