"""Checkpoint to ONNX: find and read a checkpoint safely, trace it, and measure how true the trace is.

The only part of sdrt that imports torch, diffusers and transformers.
"""
