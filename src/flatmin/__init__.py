"""Flatmin: from ImageNet weights to the flattest minimum that your data allows."""

import os
import platform

# Read when TensorFlow is loaded: without it each stage opens with a page about instruction sets and missing GPUs.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# TensorFlow leaves oneDNN out where an x86 processor has no AVX-512 VNNI; docs/speed.md tells what that costs.
if platform.machine() == "x86_64":
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
